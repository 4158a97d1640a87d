//! Checkpoints: `checkpoint-N/` holds the student, the target, the optimiser and the place in the data, whole or not at all.
//!
//! In a folder a checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed. In S3 its files
//! are written where they belong and `state.json` last: a checkpoint without it is none. Either way `state.json` carries the
//! checksum of every other file, and old checkpoints go only after the new one stands.

mod aside;
mod saver;
mod snapshot;
mod store;

pub(super) use saver::{Saved, Saver};
pub(super) use snapshot::{Snapshot, write_model};
pub(super) use store::{Checkpoints, Found, fetch, open};

use std::collections::BTreeMap;

use coffey_pipeline::order::Cursor;
use serde::{Deserialize, Serialize};

use super::TrainError;
use super::optimizer::Numbers;

/// Counts up when an older coffey could not read what is written.
const FORMAT: u32 = 3;
const STATE: &str = "state.json";
/// The optimiser's tensors.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";

/// What every version of [`State`] begins with.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    format: u32,
    /// Steps made.
    pub(super) step: u64,
    /// Samples trained on.
    pub(super) samples: u64,
    /// The optimiser's own numbers.
    pub(super) optimizer: Numbers,
    /// The place in the stream after the last batch of that step.
    pub(super) cursor: Cursor,
    /// The run's configuration.
    pub(super) configuration: String,
    /// SHA-256 of every other file, by its path in the checkpoint.
    checksums: BTreeMap<String, String>,
}

impl State {
    pub(super) fn new(
        (step, samples): (u64, u64),
        optimizer: Numbers,
        cursor: Cursor,
        configuration: String,
    ) -> Self {
        Self {
            format: FORMAT,
            step,
            samples,
            optimizer,
            cursor,
            configuration,
            checksums: BTreeMap::new(),
        }
    }

    /// Reads the `state.json` of the checkpoint at `place`.
    fn read(place: &str, text: &[u8]) -> Result<Self, TrainError> {
        let unreadable = |e: serde_json::Error| damaged(place, format!("{STATE}: {e}"));
        let Format { format } = serde_json::from_slice(text).map_err(unreadable)?;
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
