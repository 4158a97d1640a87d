//! Watching a run over HTTP: a page, numbers for Prometheus, and a health check.
//!
//! A command reports to a [`Monitor`]; a [`Server`] answers from it: the page at `/` with its data (`/events`, `/grid.png`),
//! `/metrics` and `/healthz`. Values are read when they are asked for, and once a second for the page; a client can neither
//! slow the run nor change it.

mod connections;
mod history;
mod page;
mod prometheus;
mod server;
mod status;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coffey_pipeline::FlowMetrics;
use coffey_pipeline::flow::Recent;
use coffey_pipeline::metrics::{
    CHECKPOINT_SECONDS, EXCHANGE_SECONDS, FASTEST_RANK_SECONDS, RANKS, SLOWEST_RANK,
    SLOWEST_RANK_SECONDS, TRAIN_GRAD_NORM, TRAIN_LOSS, TRAIN_LR, TRAIN_SAMPLES, TRAIN_STEP,
};
use coffey_pipeline::source::ServerRecord;
use coffey_pipeline::stages::Stage;
use metrics::{counter, gauge};
use serde::Serialize;

use history::History;
pub use server::Server;

use crate::pace::Pace;

/// The state of a run, reported by its command. Clones share it.
#[derive(Clone, Debug)]
pub struct Monitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    flow: FlowMetrics,
    s3: ServerRecord,
    command: StreamingCommand,
    subject: String,
    stall_timeout: Duration,
    begun: Instant,
    /// Since when the run waits for the next batch or step, in milliseconds after `begun`; [`NOT_WAITING`] if it does not.
    since: AtomicU64,
    reported: Mutex<Reported>,
}

const NOT_WAITING: u64 = u64::MAX;

/// A command that streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamingCommand {
    /// `coffey train`
    Train,
    /// `coffey precompute`
    Precompute,
    /// `coffey bench`
    Bench,
}

impl StreamingCommand {
    /// The last stage of the command.
    pub fn consumer(self) -> Stage {
        match self {
            Self::Train | Self::Bench => Stage::Train,
            Self::Precompute => Stage::Write,
        }
    }

    /// The stages of the command, in the order of the data.
    fn stages(self) -> impl Iterator<Item = Stage> {
        Stage::ALL.into_iter().filter(move |stage| match stage {
            Stage::Encode => self != Self::Bench,
            Stage::Train | Stage::Write => *stage == self.consumer(),
            _ => true,
        })
    }
}

/// Reports of the command so far.
#[derive(Debug, Default)]
struct Reported {
    /// The command waits for its first batch, or has had it.
    streams: bool,
    goal: Option<Goal>,
    step: Option<StepFigures>,
    ranks: Option<RankFigures>,
    history: History,
    checkpoint: Option<SavedCheckpoint>,
    grid: Option<Grid>,
    recent: Recent,
}

/// The newest step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepFigures {
    /// Its number, from 1.
    pub step: u64,
    /// Mean loss over its micro-batches.
    pub loss: f64,
    /// Learning rate it was made with.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Distance of the student's one-step samples from the teacher's, if measured at this step.
    pub endpoint_error: Option<f64>,
    /// Samples trained on so far, also before a resume.
    pub samples: u64,
}

impl StepFigures {
    /// Sets the gauges of the newest step.
    fn record(&self) {
        gauge!(TRAIN_STEP).set(self.step as f64);
        gauge!(TRAIN_LOSS).set(self.loss);
        gauge!(TRAIN_GRAD_NORM).set(self.grad_norm);
        gauge!(TRAIN_LR).set(self.lr);
        counter!(TRAIN_SAMPLES).absolute(self.samples);
    }
}

/// The ranks in the newest step. A rank's time is that from the beginning of the step until its gradients are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RankFigures {
    /// Number of ranks, at least 2.
    pub ranks: usize,
    /// The slowest rank.
    pub slowest: usize,
    /// Its time.
    pub slowest_seconds: f64,
    /// Time of the fastest rank.
    pub fastest_seconds: f64,
    /// Time in which gradients and weights were exchanged, on rank 0.
    pub exchange_seconds: f64,
}

/// A run without progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stalled {
    /// Time without progress.
    pub seconds: u64,
    /// The stage that hangs.
    pub stage: Stage,
}

/// The work of a command.
#[derive(Clone, Copy, Debug)]
struct Goal {
    unit: &'static str,
    pace: Pace,
}

/// The newest checkpoint: when it was complete, and how long saving took.
#[derive(Clone, Copy, Debug)]
struct SavedCheckpoint {
    saved: Instant,
    took: Duration,
}

/// The newest validation grid.
#[derive(Clone, Debug)]
struct Grid {
    step: u64,
    path: PathBuf,
}

impl Monitor {
    /// Watches the stages of `flow` and the requests to `s3`, for a command that makes `subject`. Without a batch or step
    /// for `stall_timeout` the run counts as stalled.
    pub fn new(
        flow: FlowMetrics,
        s3: ServerRecord,
        command: StreamingCommand,
        subject: String,
        stall_timeout: Duration,
    ) -> Self {
        Self(Arc::new(Shared {
            flow,
            s3,
            command,
            subject,
            stall_timeout,
            begun: Instant::now(),
            since: AtomicU64::new(NOT_WAITING),
            reported: Mutex::default(),
        }))
    }

    /// The registry that the stages report to.
    pub fn flow(&self) -> &FlowMetrics {
        &self.0.flow
    }

    /// Sets the goal: `total` steps, shards or samples (`unit` names them), `done` of them before the command began.
    pub fn expect(&self, unit: &'static str, done: u64, total: u64) {
        self.reported().goal = Some(Goal {
            unit,
            pace: Pace::new(done, total),
        });
    }

    /// Records how many units of the goal are done.
    pub fn advance(&self, done: u64) {
        if let Some(goal) = &mut self.reported().goal {
            goal.pace.advance(done);
        }
    }

    /// Records that a batch or step is done, or that the first one begins: the run waits for the next one from now on.
    pub fn heartbeat(&self) {
        let now = u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(NOT_WAITING);
        self.0.since.store(now, Ordering::Relaxed);
        let reported = &mut *self.reported();
        if reported.streams {
            reported.recent.mark(&self.0.flow);
        }
        reported.streams = true;
    }

    /// Records that the run waits for no further batch or step.
    pub fn stop_waiting(&self) {
        self.0.since.store(NOT_WAITING, Ordering::Relaxed);
    }

    /// Records the steps made before this process.
    pub fn resume(&self, steps: impl Iterator<Item = StepFigures>) {
        let reported = &mut *self.reported();
        for figures in steps {
            reported.history.push(&figures);
            reported.step = Some(figures);
        }
        if let Some(newest) = &reported.step {
            newest.record();
        }
    }

    /// Records a step.
    pub fn step(&self, figures: StepFigures) {
        self.resume(std::iter::once(figures));
        self.advance(figures.step);
        self.heartbeat();
    }

    /// Records the ranks of a step.
    pub fn ranks(&self, figures: RankFigures) {
        gauge!(RANKS).set(figures.ranks as f64);
        gauge!(SLOWEST_RANK).set(figures.slowest as f64);
        gauge!(SLOWEST_RANK_SECONDS).set(figures.slowest_seconds);
        gauge!(FASTEST_RANK_SECONDS).set(figures.fastest_seconds);
        gauge!(EXCHANGE_SECONDS).set(figures.exchange_seconds);
        self.reported().ranks = Some(figures);
    }

    /// Records a saved checkpoint and how long saving took.
    pub fn checkpoint(&self, took: Duration) {
        gauge!(CHECKPOINT_SECONDS).set(took.as_secs_f64());
        let saved = Instant::now();
        self.reported().checkpoint = Some(SavedCheckpoint { saved, took });
    }

    /// Records the file with the grid of a step.
    pub fn grid(&self, step: u64, path: PathBuf) {
        self.reported().grid = Some(Grid { step, path });
    }

    /// The time without progress and the stage that hangs, if the run is stalled.
    pub fn stalled(&self) -> Option<Stalled> {
        let since = Duration::from_millis(self.0.since.load(Ordering::Relaxed));
        let waited = self.0.begun.elapsed().checked_sub(since)?;
        (waited > self.0.stall_timeout).then(|| Stalled {
            seconds: waited.as_secs(),
            stage: self
                .0
                .flow
                .snapshot()
                .hanging_stage(self.0.command.consumer()),
        })
    }

    fn reported(&self) -> MutexGuard<'_, Reported> {
        // Plain numbers, usable after a panic in another thread.
        self.0
            .reported
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use coffey_pipeline::flow::channel;
    use coffey_pipeline::stages::FlowChannel;

    #[test]
    fn monitor_is_stalled_only_while_waiting() {
        let flow = FlowMetrics::new();
        let timeout = Duration::from_millis(40);
        let monitor = Monitor::new(
            flow.clone(),
            ServerRecord::s3(),
            StreamingCommand::Train,
            String::new(),
            timeout,
        );
        let pause = || std::thread::sleep(2 * timeout);
        pause();
        assert_eq!(monitor.stalled(), None, "models are loaded");
        monitor.heartbeat();
        assert_eq!(monitor.stalled(), None);
        pause();
        assert_eq!(monitor.stalled().map(|s| s.stage), Some(Stage::Fetch));
        let (sender, _receiver) = channel::<u8>(&flow, FlowChannel::Encoded.name(), 1);
        sender.send_blocking(1, &flow.stage(Stage::Encode)).unwrap();
        assert_eq!(monitor.stalled().map(|s| s.stage), Some(Stage::Train));
        monitor.step(StepFigures {
            step: 1,
            loss: 0.1,
            lr: 1e-4,
            grad_norm: 1.0,
            endpoint_error: None,
            samples: 4,
        });
        assert_eq!(monitor.stalled(), None);
        monitor.stop_waiting();
        pause();
        assert_eq!(monitor.stalled(), None, "the last pictures are drawn");
    }
}
