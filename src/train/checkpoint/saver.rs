//! Saving checkpoints, on a thread of their own if training is to go on meanwhile.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{CheckpointStore, Snapshot};
use crate::train::TrainError;
use crate::train::lock::PrefixLock;
use crate::train::run_dir::{RunDir, RunRecords};

/// A checkpoint that was saved.
#[derive(Debug)]
pub(in crate::train) struct Saved {
    pub(in crate::train) step: u64,
    /// Folder or prefix of the checkpoint.
    pub(in crate::train) place: String,
    /// Time from the snapshot until the checkpoint was complete.
    pub(in crate::train) time: Duration,
    /// Why older checkpoints could not be removed.
    pub(in crate::train) not_pruned: Option<TrainError>,
}

/// The result of saving a step.
pub(in crate::train) type SaveOutcome = (u64, Result<Saved, TrainError>);

/// Saves the checkpoints of a run, one at a time.
#[derive(Debug)]
pub(in crate::train) struct Saver {
    target: Arc<SaveTarget>,
    running: RefCell<Option<BackgroundSave>>,
}

/// A save that runs on a thread of its own.
#[derive(Debug)]
struct BackgroundSave {
    step: u64,
    thread: JoinHandle<Result<Saved, TrainError>>,
}

#[derive(Debug)]
struct SaveTarget {
    checkpoints: CheckpointStore,
    records: RunRecords,
    /// A lock that another process may take over.
    lock: Option<Arc<PrefixLock>>,
}

impl Saver {
    pub(in crate::train) fn new(output: &RunDir, keep: usize) -> Self {
        Self {
            target: Arc::new(SaveTarget {
                checkpoints: output.checkpoints(keep),
                records: output.records(),
                lock: output.prefix_lock().cloned(),
            }),
            running: RefCell::new(None),
        }
    }

    pub(in crate::train) fn checkpoints(&self) -> &CheckpointStore {
        &self.target.checkpoints
    }

    pub(in crate::train) fn records(&self) -> &RunRecords {
        &self.target.records
    }

    /// Saves on this thread. No other save may be running.
    pub(in crate::train) fn save(&self, snapshot: &Snapshot) -> Result<Saved, TrainError> {
        self.target.save(snapshot, Instant::now())
    }

    /// Starts a save on a thread of its own. No other save may be running.
    pub(in crate::train) fn begin(&self, snapshot: Snapshot) -> std::io::Result<()> {
        let (target, step, begun) = (Arc::clone(&self.target), snapshot.step(), Instant::now());
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || target.save(&snapshot, begun))?;
        self.running.replace(Some(BackgroundSave { step, thread }));
        Ok(())
    }

    /// The result of a save in the background that has finished.
    pub(in crate::train) fn poll(&self) -> Option<SaveOutcome> {
        let finished = match &*self.running.borrow() {
            Some(save) => save.thread.is_finished(),
            None => false,
        };
        if finished { self.wait() } else { None }
    }

    /// Waits for the save in the background, if there is one.
    pub(in crate::train) fn wait(&self) -> Option<SaveOutcome> {
        let BackgroundSave { step, thread } = self.running.take()?;
        let outcome = thread.join();
        Some((
            step,
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        ))
    }
}

impl Drop for Saver {
    /// Waits for a save in progress, also when the run ends in an error.
    fn drop(&mut self) {
        if let Some(save) = self.running.take() {
            // The run reports its own error.
            let _ = save.thread.join();
        }
    }
}

impl SaveTarget {
    fn save(&self, snapshot: &Snapshot, begun: Instant) -> Result<Saved, TrainError> {
        let step = snapshot.step();
        let place = self.checkpoints.save(snapshot, || {
            self.records.upload()?;
            self.lock.as_ref().map_or(Ok(()), |lock| lock.check(true))
        })?;
        Ok(Saved {
            step,
            place,
            time: begun.elapsed(),
            not_pruned: self.checkpoints.prune(step).err(),
        })
    }
}
