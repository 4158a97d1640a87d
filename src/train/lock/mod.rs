//! The locks of a run's output: two runs in one output would destroy each other's checkpoints.

mod folder;
mod prefix;

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::TrainError;
use crate::config::in_s3;

pub(super) use folder::FolderLock;
pub(super) use prefix::{PrefixLock, check_prefix_free};

/// Name of the file or object in the output.
pub(super) const LOCK: &str = ".lock";

/// How to wait for a lock that another process holds.
#[derive(Clone, Copy)]
pub struct LockWait<'a> {
    /// Time after which a process that still holds the lock is an error.
    pub limit: Duration,
    /// Cancelled when the wait is to end.
    pub cancel: &'a CancellationToken,
    /// Tells what is waited for.
    pub say: &'a dyn Fn(String),
}

impl fmt::Debug for LockWait<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockWait").finish_non_exhaustive()
    }
}

impl LockWait<'_> {
    /// Waits for `pause`. Returns whether the limit, counted from `since`, is then not over.
    fn wait(self, pause: Duration, since: Instant) -> Result<bool, TrainError> {
        if self.cancel.is_cancelled() {
            return Err(TrainError::Stopped);
        }
        std::thread::sleep(pause);
        Ok(since.elapsed() < self.limit)
    }
}

/// The error for an output that another process trains into. `holder`: the process, in brackets; may be empty.
fn held(place: &Path, holder: &str) -> TrainError {
    let output = if in_s3(place) { "prefix" } else { "folder" };
    TrainError::Mismatch(format!(
        "{}: another process{holder} is training into this {output}; stop it, or name another train.output",
        place.display()
    ))
}
