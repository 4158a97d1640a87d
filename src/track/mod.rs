//! Files of experiment trackers: TensorBoard's events and W&B's offline runs.
//!
//! A writer holds each step once: on resume it removes the events of later steps. It never decides what is recorded.

mod tensorboard;
mod wandb;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

pub use tensorboard::TensorBoard;
pub use wandb::OfflineRun;

/// Why a tracker's file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct TrackError {
    /// The file or folder.
    pub path: PathBuf,
    /// The cause.
    pub source: std::io::Error,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrackError {
    let path = path.to_owned();
    move |source| TrackError { path, source }
}

/// The events that a folder's files have after a resume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExistingEvents {
    /// Steps with scalars, in the order of the files.
    pub scalars: Vec<u64>,
    /// Step and tag of each image.
    pub pictures: BTreeSet<(u64, String)>,
}

/// Writer of one tracker's files for one run. Write nothing after an error: readers stop at a truncated record.
pub trait EventWriter: fmt::Debug {
    /// Removes all events, to write all of them again.
    ///
    /// # Errors
    /// When a file can't be removed or created.
    fn clear(&mut self) -> Result<(), TrackError>;

    /// Writes the scalars of a step.
    ///
    /// # Errors
    /// When the file can't be written.
    fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), TrackError>;

    /// Writes an image of a step: a PNG of `size`, width and height in pixels.
    ///
    /// # Errors
    /// When the file can't be written.
    fn picture(
        &mut self,
        step: u64,
        tag: &str,
        size: (u32, u32),
        png: Vec<u8>,
    ) -> Result<(), TrackError>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// When the file can't be written or flushed.
    fn sync(&mut self) -> Result<(), TrackError>;

    /// Ends a run that made all of its steps. Returns the folder to upload, below the run's, if the tracker's files are uploaded.
    ///
    /// # Errors
    /// When the file can't be written.
    fn finish(&mut self) -> Result<Option<PathBuf>, TrackError> {
        self.sync().map(|()| None)
    }
}
