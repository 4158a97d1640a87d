//! `[track]`: experiment trackers.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::limits::Limits;

/// Characters that W&B refuses in the name of a project.
const NOT_IN_PROJECTS: [char; 6] = ['/', '\\', '#', '?', '%', ':'];

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

impl Track {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let Some(project) = &self.wandb else {
            return Ok(());
        };
        let ok = (1..=128).contains(&project.chars().count()) && !project.contains(NOT_IN_PROJECTS);
        let needs =
            "must be 1 to 128 characters without / \\ # ? % and :, as W&B asks of a project's name";
        limits.check("track.wandb", format!("{project:?}"), ok, needs)
    }
}
