//! What a run tells whoever looks on: numbers for Prometheus, and whether it still goes on.
//!
//! A command reports to a [`Monitor`]; a [`Server`] answers `/metrics` and `/healthz` from it. Everything is read when it is
//! asked for, so that nothing is spent on a run nobody looks at. Nothing here changes what a run does.

mod collector;
mod server;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coffey_pipeline::FlowMetrics;
use coffey_pipeline::flow::Stage;

pub use server::Server;

/// What a run reports to. Clones share it.
#[derive(Clone, Debug)]
pub struct Monitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    flow: FlowMetrics,
    consumer: Stage,
    stall_timeout: Duration,
    begun: Instant,
    /// Since when the next batch or step is waited for, in milliseconds after `begun`; [`NOT_WAITING`] when none is.
    since: AtomicU64,
    training: Mutex<Training>,
}

const NOT_WAITING: u64 = u64::MAX;

/// What the training loop says of itself.
#[derive(Clone, Copy, Debug, Default)]
struct Training {
    step: Option<StepFigures>,
    checkpoint_seconds: Option<f64>,
}

/// The newest step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepFigures {
    /// Its number, from 1.
    pub step: u64,
    /// Mean loss over its micro-batches.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Samples trained on so far, before a resume included.
    pub samples: u64,
}

/// A run that does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stalled {
    /// For how long.
    pub seconds: u64,
    /// The stage that hangs.
    pub stage: Stage,
}

impl Monitor {
    /// Watches the stages of `flow`, the last of which is `consumer`. Without a batch or step for `stall_timeout` the run counts
    /// as stalled.
    pub fn new(flow: FlowMetrics, consumer: Stage, stall_timeout: Duration) -> Self {
        Self(Arc::new(Shared {
            flow,
            consumer,
            stall_timeout,
            begun: Instant::now(),
            since: AtomicU64::new(NOT_WAITING),
            training: Mutex::default(),
        }))
    }

    /// What the stages report to.
    pub fn flow(&self) -> &FlowMetrics {
        &self.0.flow
    }

    /// A batch or step is done, or the first one begins: from now on the next one is waited for.
    pub fn beat(&self) {
        let now = u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(NOT_WAITING);
        self.0.since.store(now, Ordering::Relaxed);
    }

    /// No further batch or step is waited for.
    pub fn rest(&self) {
        self.0.since.store(NOT_WAITING, Ordering::Relaxed);
    }

    /// A step was made.
    pub fn step(&self, figures: StepFigures) {
        self.training().step = Some(figures);
        self.beat();
    }

    /// A checkpoint was saved, and took so long.
    pub fn checkpoint(&self, time: Duration) {
        self.training().checkpoint_seconds = Some(time.as_secs_f64());
    }

    /// The stage that hangs, if the run does not go on.
    pub fn stalled(&self) -> Option<Stalled> {
        let since = Duration::from_millis(self.0.since.load(Ordering::Relaxed));
        let waited = self.0.begun.elapsed().checked_sub(since)?;
        (waited > self.0.stall_timeout).then(|| Stalled {
            seconds: waited.as_secs(),
            stage: self.0.flow.snapshot().hanging_stage(self.0.consumer),
        })
    }

    fn training(&self) -> MutexGuard<'_, Training> {
        // Plain numbers: usable whatever happened to a thread that held them.
        self.0
            .training
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffey_pipeline::flow::channel;

    #[test]
    fn a_run_is_stalled_only_while_something_is_waited_for() {
        let flow = FlowMetrics::new();
        let timeout = Duration::from_millis(40);
        let monitor = Monitor::new(flow.clone(), Stage::Train, timeout);
        let pause = || std::thread::sleep(2 * timeout);
        pause();
        assert_eq!(monitor.stalled(), None, "models are loaded");
        monitor.beat();
        assert_eq!(monitor.stalled(), None);
        pause();
        assert_eq!(monitor.stalled().map(|s| s.stage), Some(Stage::Fetch));
        let (sender, _receiver) = channel::<u8>(&flow, "encoded", 1);
        sender.send_blocking(1, &flow.stage(Stage::Encode)).unwrap();
        assert_eq!(monitor.stalled().map(|s| s.stage), Some(Stage::Train));
        monitor.step(StepFigures {
            step: 1,
            loss: 0.1,
            grad_norm: 1.0,
            samples: 4,
        });
        assert_eq!(monitor.stalled(), None);
        monitor.rest();
        pause();
        assert_eq!(monitor.stalled(), None, "the last pictures are drawn");
    }
}
