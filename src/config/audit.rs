//! `[audit]`: inputs and results of the first steps, written out so that other software can replay them. Without the table
//! nothing is written. No flags.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_STEPS, integer};
use super::limits::Limits;

/// Bounds of the numbers in `[audit]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("audit.steps", 1, MAX_STEPS)];

/// `[audit]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    /// Folder, or prefix in S3, for the audit files.
    pub dir: PathBuf,
    /// Steps audited, from the first.
    #[serde(default = "default_steps")]
    pub steps: u64,
}

fn default_steps() -> u64 {
    4
}

impl Audit {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        limits.folder_or_prefix("audit.dir", Some(&self.dir))
    }
}
