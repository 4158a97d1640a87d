//! `[track]`: experiment trackers.

use serde::{Deserialize, Serialize};

/// `[track]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Track {
    /// Write TensorBoard events into the run's folder. `--report_to`
    pub tensorboard: bool,
    /// Project of Weights & Biases for which an offline run is written into the run's folder; unset: none. `wandb sync` uploads it.
    /// `--report_to`, `--tracker_project_name`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wandb: Option<String>,
}

impl Default for Track {
    fn default() -> Self {
        Self {
            tensorboard: true,
            wandb: None,
        }
    }
}
