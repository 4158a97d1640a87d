//! `[track]`: experiment trackers.

use serde::{Deserialize, Serialize};

/// `[track]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Track {
    /// Write TensorBoard events into the run's folder. `--report_to`
    pub tensorboard: bool,
}

impl Default for Track {
    fn default() -> Self {
        Self { tensorboard: true }
    }
}
