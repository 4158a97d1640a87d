//! `[checkpoint]`: when training state is saved, and which checkpoint a run starts from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_STEPS, integer};
use super::limits::{Limits, quoted};
use super::values::in_s3;

/// Bounds of the numbers in `[checkpoint]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("checkpoint.every", 1, MAX_STEPS),
    integer("checkpoint.keep", 1, MAX_STEPS),
];

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Steps between checkpoints. `--checkpointing_steps`
    pub every: u64,
    /// Newest checkpoints kept. `--checkpoints_total_limit`
    pub keep: usize,
    /// Checkpoint to resume from. `--resume_from_checkpoint`
    pub resume: Resume,
    /// Write checkpoints from a copy while training goes on. No flag.
    pub background: bool,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every: 200,
            keep: 10,
            resume: Resume::Latest,
            background: true,
        }
    }
}

impl Checkpoint {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        if let Resume::From(checkpoint) = &self.resume {
            limits.folder_or_prefix("checkpoint.resume", Some(checkpoint))?;
            let ok = !in_s3(checkpoint) || checkpoint.components().count() > 2;
            let needs = "must name a checkpoint, as \"s3://bucket/runs/first/checkpoint-200\"";
            limits.check("checkpoint.resume", quoted(checkpoint), ok, needs)?;
        }
        Ok(())
    }
}

/// Checkpoint a run starts from: `"latest"`, `"never"`, a path or an `s3://` prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Resume {
    /// The newest whole checkpoint of the run's output, if there is one.
    Latest,
    /// None: start from the teacher.
    Never,
    /// This checkpoint folder and no other.
    From(PathBuf),
}

impl From<String> for Resume {
    fn from(text: String) -> Self {
        match text.as_str() {
            "latest" => Self::Latest,
            "never" => Self::Never,
            _ => Self::From(PathBuf::from(text)),
        }
    }
}

impl From<Resume> for String {
    fn from(resume: Resume) -> Self {
        match resume {
            Resume::Latest => "latest".to_owned(),
            Resume::Never => "never".to_owned(),
            Resume::From(path) => path.to_string_lossy().into_owned(),
        }
    }
}
