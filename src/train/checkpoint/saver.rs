//! Saving while training goes on: one checkpoint at a time, on a thread of its own.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Checkpoints, Snapshot};
use crate::train::TrainError;
use crate::train::output::Records;

/// A checkpoint that stands.
#[derive(Debug)]
pub(in crate::train) struct Saved {
    pub(in crate::train) step: u64,
    /// Where it stands.
    pub(in crate::train) place: String,
    /// From the snapshot until it stood.
    pub(in crate::train) time: Duration,
    /// Why older ones that should have gone are still there.
    pub(in crate::train) older: Option<TrainError>,
}

/// What came of saving a step.
pub(in crate::train) type Outcome = (u64, Result<Saved, TrainError>);

/// Who writes a run's checkpoints.
#[derive(Debug)]
pub(in crate::train) struct Saver {
    work: Arc<Work>,
    running: Option<(u64, JoinHandle<Result<Saved, TrainError>>)>,
}

#[derive(Debug)]
struct Work {
    checkpoints: Checkpoints,
    records: Records,
}

impl Saver {
    pub(in crate::train) fn new(checkpoints: Checkpoints, records: Records) -> Self {
        Self {
            work: Arc::new(Work {
                checkpoints,
                records,
            }),
            running: None,
        }
    }

    pub(in crate::train) fn checkpoints(&self) -> &Checkpoints {
        &self.work.checkpoints
    }

    pub(in crate::train) fn records(&self) -> &Records {
        &self.work.records
    }

    /// Saves on this thread. None may be under way.
    pub(in crate::train) fn save(&self, snapshot: &Snapshot) -> Result<Saved, TrainError> {
        self.work.save(snapshot, Instant::now())
    }

    /// Saves on a thread of its own. None may be under way.
    pub(in crate::train) fn begin(&mut self, snapshot: Snapshot) -> std::io::Result<()> {
        let (work, step, begun) = (Arc::clone(&self.work), snapshot.step(), Instant::now());
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || work.save(&snapshot, begun))?;
        self.running = Some((step, thread));
        Ok(())
    }

    /// What came of the save under way, if it is over.
    pub(in crate::train) fn over(&mut self) -> Option<Outcome> {
        match &self.running {
            Some((_, thread)) if thread.is_finished() => self.wait(),
            _ => None,
        }
    }

    /// What comes of the save under way, if there is one.
    pub(in crate::train) fn wait(&mut self) -> Option<Outcome> {
        let (step, thread) = self.running.take()?;
        let outcome = thread.join();
        Some((
            step,
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        ))
    }
}

impl Drop for Saver {
    /// A checkpoint that is being written when a run ends in an error is worth the wait.
    fn drop(&mut self) {
        if let Some((_, thread)) = self.running.take() {
            let _panicked = thread.join();
        }
    }
}

impl Work {
    fn save(&self, snapshot: &Snapshot, begun: Instant) -> Result<Saved, TrainError> {
        let step = snapshot.step();
        let place = self.checkpoints.save(snapshot, || self.records.upload())?;
        Ok(Saved {
            step,
            place,
            time: begun.elapsed(),
            older: self.checkpoints.prune(step).err(),
        })
    }
}
