//! Checkpoints: `checkpoint-N/` holds the student, its moving average, the optimiser and the position in the data, whole or not
//! at all.
//!
//! In a folder a checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed. In S3 its files
//! are written in place and `state.json` last: without it there is no checkpoint. Either way `state.json` holds the checksum of
//! every other file, and old checkpoints are removed only after the new one is complete.

mod atomic_dir;
mod saver;
mod snapshot;
mod store;

pub(super) use saver::{Saved, Saver};
pub(super) use snapshot::{Snapshot, write_model};
pub(super) use store::{CheckpointStore, SavedRun, fetch, open};

use std::collections::BTreeMap;

use coffey_pipeline::order::Cursor;
use serde::{Deserialize, Serialize};

use super::models_fingerprint::ModelsFingerprint;
use super::optimizer::OptimizerState;
use super::{TrainError, TrainState};

/// Format of `state.json`; raised when an older coffey could not read it.
const FORMAT: u32 = 3;
const STATE: &str = "state.json";
/// The optimiser's tensors.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";

/// What every checkpoint of a run says of it.
#[derive(Clone, Debug)]
pub(super) struct RunIdentity {
    /// The configuration, as TOML.
    pub(super) configuration: String,
    pub(super) models: ModelsFingerprint,
}

/// The first field of every version of [`CheckpointState`].
#[derive(Deserialize)]
struct FormatField {
    format: u32,
}

/// Content of `state.json`: everything that a checkpoint holds besides tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CheckpointState {
    format: u32,
    /// Steps made.
    pub(super) step: u64,
    /// Samples trained on.
    pub(super) samples: u64,
    /// The optimiser's numbers.
    pub(super) optimizer: OptimizerState,
    /// Position in the stream after the last batch of that step.
    pub(super) cursor: Cursor,
    /// The run's configuration.
    pub(super) configuration: String,
    /// Fingerprint of the run's models; `None` in checkpoints of versions before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) models: Option<ModelsFingerprint>,
    /// SHA-256 of every other file, by its path in the checkpoint.
    checksums: BTreeMap<String, String>,
}

impl CheckpointState {
    /// `None` before the first step.
    fn new(state: &TrainState, run: &RunIdentity) -> Option<Self> {
        Some(Self {
            format: FORMAT,
            step: state.step,
            samples: state.samples,
            optimizer: state.optimizer.numbers(),
            cursor: state.cursor.clone()?,
            configuration: run.configuration.clone(),
            models: Some(run.models.clone()),
            checksums: BTreeMap::new(),
        })
    }

    /// Reads the `state.json` of the checkpoint at `place`.
    fn read(place: &str, text: &[u8]) -> Result<Self, TrainError> {
        let unreadable = |e: serde_json::Error| damaged(place, format!("{STATE}: {e}"));
        let FormatField { format } = serde_json::from_slice(text).map_err(unreadable)?;
        if format != FORMAT {
            return Err(TrainError::CheckpointFormat {
                path: place.into(),
                found: format,
                reads: FORMAT,
            });
        }
        serde_json::from_slice(text).map_err(unreadable)
    }
}

fn damaged(place: &str, message: String) -> TrainError {
    TrainError::Checkpoint {
        path: place.into(),
        message: format!("damaged checkpoint: {message}"),
    }
}

fn not_as_written(place: &str, name: &str) -> TrainError {
    let message = format!("{name} does not have the checksum it was written with");
    damaged(place, message)
}
