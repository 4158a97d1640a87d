//! Checkpoints: `checkpoint-N/` holds the student, its moving average, the optimiser and the position in the data, whole or not
//! at all.
//!
//! In a folder a checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed. In S3 its files
//! are written in place and `state.json` last: without it there is no checkpoint. Either way `state.json` holds the checksum of
//! every other file and its own, and old checkpoints are removed only after the new one is complete.

mod atomic_dir;
mod saved_run;
mod saver;
mod snapshot;
mod store;

pub(super) use saved_run::{SavedRun, fetch, open};
pub(super) use saver::{Saved, Saver};
pub(super) use snapshot::{Snapshot, write_folder};
pub(super) use store::CheckpointStore;

use std::collections::BTreeMap;

use coffey_pipeline::order::Cursor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::models_fingerprint::ModelsFingerprint;
use super::optimizer::OptimizerState;
use super::{TrainError, TrainState};

/// Format of `state.json`; raised when an older coffey could not read it.
const FORMAT: u32 = 3;
pub(super) const STATE: &str = "state.json";
/// The optimiser's tensors.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";
/// The text around the last field of `state.json`.
const BEFORE_SHA256: &str = ",\n  \"sha256\": \"";
const AFTER_SHA256: &str = "\"\n}";

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
    /// SHA-256 of the bytes of `state.json` before this field, which is the last; `None` in checkpoints of versions before it was
    /// kept.
    #[serde(default, skip_serializing)]
    sha256: Option<String>,
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
            sha256: None,
        })
    }

    /// The text of `state.json`.
    fn to_text(&self) -> serde_json::Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.truncate(text.len() - "\n}".len());
        let end = end_with_sha256(&text);
        text.extend(end.into_bytes());
        Ok(text)
    }

    /// Reads the `state.json` of the checkpoint at `place`. `name` is the last part of the place.
    fn read(place: &str, name: &str, text: &[u8]) -> Result<Self, TrainError> {
        let wrong = |what: String| damaged(place, format!("{STATE}: {what}"));
        let unreadable = |e: serde_json::Error| wrong(e.to_string());
        let FormatField { format } = serde_json::from_slice(text).map_err(unreadable)?;
        if format != FORMAT {
            return Err(TrainError::CheckpointFormat {
                path: place.into(),
                found: format,
                reads: FORMAT,
            });
        }
        let state: Self = serde_json::from_slice(text).map_err(unreadable)?;
        if let Some(sha256) = &state.sha256 {
            let length = BEFORE_SHA256.len() + sha256.len() + AFTER_SHA256.len();
            let (content, end) = text.split_at(text.len().saturating_sub(length));
            if end != end_with_sha256(content).as_bytes() {
                return Err(wrong("it is not as it was written (sha256)".to_owned()));
            }
        }
        match step_of(name) {
            Some(step) if step != state.step => Err(wrong(format!(
                "it is of step {}, and the checkpoint of step {step}",
                state.step
            ))),
            _ => Ok(state),
        }
    }
}

/// The end of a `state.json` that begins with `content`.
fn end_with_sha256(content: &[u8]) -> String {
    let sha256 = Sha256::digest(content);
    format!("{BEFORE_SHA256}{sha256:x}{AFTER_SHA256}")
}

/// Step of a checkpoint by the name of its folder.
fn step_of(name: &str) -> Option<u64> {
    let text = name.strip_prefix(PREFIX)?;
    let step: u64 = text.parse().ok()?;
    // Not "+5" or "05", whose folder no step has.
    (step.to_string() == text).then_some(step)
}

fn damaged(place: &str, message: String) -> TrainError {
    TrainError::Checkpoint {
        path: place.into(),
        message: format!("damaged checkpoint: {message}"),
    }
}

#[cfg(test)]
mod tests;
