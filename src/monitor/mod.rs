//! What a run tells whoever looks on: a page for a person, numbers for Prometheus, and whether it still goes on.
//!
//! A command reports to a [`Monitor`]; a [`Server`] answers from it: the page at `/` with what moves on it (`/events`,
//! `/grid.png`), `/metrics` and `/healthz`. Numbers are read when they are asked for, and for the page once a second whoever
//! looks on; nobody who does can slow the run, or change what it does.

mod collector;
mod history;
mod page;
mod server;
mod status;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coffey_pipeline::FlowMetrics;
use coffey_pipeline::flow::{Recent, Stage};
use serde::Serialize;

use history::History;
pub use server::Server;

/// What a run reports to. Clones share it.
#[derive(Clone, Debug)]
pub struct Monitor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    flow: FlowMetrics,
    command: Command,
    subject: String,
    stall_timeout: Duration,
    begun: Instant,
    /// Since when the next batch or step is waited for, in milliseconds after `begun`; [`NOT_WAITING`] when none is.
    since: AtomicU64,
    seen: Mutex<Seen>,
}

const NOT_WAITING: u64 = u64::MAX;

/// A command that streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// `coffey train`
    Train,
    /// `coffey precompute`
    Precompute,
    /// `coffey bench`
    Bench,
}

impl Command {
    /// The last of its stages.
    pub fn consumer(self) -> Stage {
        match self {
            Self::Train | Self::Bench => Stage::Train,
            Self::Precompute => Stage::Write,
        }
    }

    /// Its stages, in the order of the data.
    fn stages(self) -> impl Iterator<Item = Stage> {
        Stage::ALL.into_iter().filter(move |stage| match stage {
            Stage::Encode => self != Self::Bench,
            Stage::Train | Stage::Write => *stage == self.consumer(),
            _ => true,
        })
    }
}

/// What a command said of itself.
#[derive(Debug, Default)]
struct Seen {
    /// The first batch is waited for, or came already.
    streams: bool,
    goal: Option<Goal>,
    step: Option<StepFigures>,
    history: History,
    checkpoint: Option<Checkpoint>,
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
    /// How far the student's samples in one step are from the teacher's, where that was measured at this step.
    pub endpoint_error: Option<f64>,
    /// Samples trained on so far, before a resume included.
    pub samples: u64,
}

/// A run that does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Stalled {
    /// For how long.
    pub seconds: u64,
    /// The stage that hangs.
    pub stage: Stage,
}

/// How much there is to do, and how much is done.
#[derive(Clone, Copy, Debug)]
struct Goal {
    unit: &'static str,
    done: u64,
    total: u64,
    /// When the first of this process was done, and how many there were then.
    first: Option<(Instant, u64)>,
    newest: Instant,
}

impl Goal {
    /// Time that is left if the rest goes as what came after the first of this process.
    fn left(&self, now: Instant) -> Option<Duration> {
        let (begun, before) = self.first?;
        let made = self.done.checked_sub(before).filter(|made| *made > 0)?;
        let each = (self.newest - begun).as_secs_f64() / made as f64;
        let left = each * self.total.saturating_sub(self.done) as f64;
        let waited = (now - self.newest).as_secs_f64();
        Duration::try_from_secs_f64((left - waited).max(0.0)).ok()
    }
}

/// The newest checkpoint: when it stood, and how long saving it took.
#[derive(Clone, Copy, Debug)]
struct Checkpoint {
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
    /// Watches the stages of `flow` for a command that makes `subject`. Without a batch or step for `stall_timeout` the run
    /// counts as stalled.
    pub fn new(
        flow: FlowMetrics,
        command: Command,
        subject: String,
        stall_timeout: Duration,
    ) -> Self {
        Self(Arc::new(Shared {
            flow,
            command,
            subject,
            stall_timeout,
            begun: Instant::now(),
            since: AtomicU64::new(NOT_WAITING),
            seen: Mutex::default(),
        }))
    }

    /// What the stages report to.
    pub fn flow(&self) -> &FlowMetrics {
        &self.0.flow
    }

    /// The command has `total` steps, shards or samples to do (`unit` says which), `done` of them before it began.
    pub fn expect(&self, unit: &'static str, done: u64, total: u64) {
        self.seen().goal = Some(Goal {
            unit,
            done,
            total,
            first: None,
            newest: Instant::now(),
        });
    }

    /// So many of what [`Monitor::expect`] announced are done by now.
    pub fn advance(&self, done: u64) {
        if let Some(goal) = &mut self.seen().goal
            && done > goal.done
        {
            (goal.done, goal.newest) = (done, Instant::now());
            goal.first.get_or_insert((goal.newest, done));
        }
    }

    /// A batch or step is done, or the first one begins: from now on the next one is waited for.
    pub fn beat(&self) {
        let now = u64::try_from(self.0.begun.elapsed().as_millis()).unwrap_or(NOT_WAITING);
        self.0.since.store(now, Ordering::Relaxed);
        let seen = &mut *self.seen();
        if seen.streams {
            seen.recent.mark(&self.0.flow);
        }
        seen.streams = true;
    }

    /// No further batch or step is waited for.
    pub fn rest(&self) {
        self.0.since.store(NOT_WAITING, Ordering::Relaxed);
    }

    /// The steps that were made before this process.
    pub fn resume(&self, steps: impl Iterator<Item = StepFigures>) {
        let seen = &mut *self.seen();
        for figures in steps {
            seen.history.push(&figures);
            seen.step = Some(figures);
        }
    }

    /// A step was made.
    pub fn step(&self, figures: StepFigures) {
        self.resume(std::iter::once(figures));
        self.advance(figures.step);
        self.beat();
    }

    /// A checkpoint was saved, and took so long.
    pub fn checkpoint(&self, took: Duration) {
        let saved = Instant::now();
        self.seen().checkpoint = Some(Checkpoint { saved, took });
    }

    /// The grid of this step is in this file.
    pub fn grid(&self, step: u64, path: PathBuf) {
        self.seen().grid = Some(Grid { step, path });
    }

    /// The stage that hangs, if the run does not go on.
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

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Plain numbers: usable whatever happened to a thread that held them.
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
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
        let monitor = Monitor::new(flow.clone(), Command::Train, String::new(), timeout);
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
            lr: 1e-4,
            grad_norm: 1.0,
            endpoint_error: None,
            samples: 4,
        });
        assert_eq!(monitor.stalled(), None);
        monitor.rest();
        pause();
        assert_eq!(monitor.stalled(), None, "the last pictures are drawn");
    }

    #[test]
    fn what_is_left_is_told_by_what_this_process_made() {
        let second = Duration::from_secs(1);
        let first = Instant::now();
        let mut goal = Goal {
            unit: "steps",
            done: 100,
            total: 200,
            first: None,
            newest: first,
        };
        assert_eq!(goal.left(first), None, "nothing is done yet");
        goal.done = 101;
        goal.first = Some((first, 101));
        assert_eq!(goal.left(first), None, "the first one filled the pipeline");
        goal.done = 111;
        goal.newest = first + 20 * second;
        assert_eq!(goal.left(goal.newest), Some(178 * second));
        assert_eq!(goal.left(goal.newest + second), Some(177 * second));
        assert_eq!(goal.left(goal.newest + 1000 * second), Some(Duration::ZERO));
    }
}
