//! `[validation]`: grids of samples drawn while training. Without the table no grids are drawn.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_GUIDANCE, MAX_STEPS, integer, real};
use super::limits::{Limits, quoted};
use super::parse::Origin;
use crate::prompt_file;

/// Sampling steps beyond which a latent consistency model has no timesteps left.
const MAX_SAMPLING_STEPS: i64 = 50;

/// Bounds of the numbers in `[validation]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("validation.every", 1, MAX_STEPS),
    integer("validation.steps", 1, MAX_SAMPLING_STEPS),
    real("validation.guidance", 0.0, MAX_GUIDANCE),
    integer("validation.images_per_prompt", 1, 256),
];

/// `[validation]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Steps between grids. `--validation_steps`
    #[serde(default = "default_every")]
    pub every: u64,
    /// Captions; each is a row of the grid. Fixed in the reference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prompts: Vec<String>,
    /// File with the captions, one a line, in place of `prompts`; [`Config::load`](super::Config::load) replaces it by them. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts_file: Option<PathBuf>,
    /// Sampling steps. Fixed at 4 in the reference.
    #[serde(default = "default_steps")]
    pub steps: usize,
    /// Guidance the student is told. Fixed at the pipeline's default, 7.5, in the reference.
    #[serde(default = "default_guidance")]
    pub guidance: f64,
    /// Images of a row. Fixed at 4 in the reference.
    #[serde(default = "default_images_per_prompt")]
    pub images_per_prompt: usize,
}

fn default_every() -> u64 {
    200
}

fn default_steps() -> usize {
    4
}

fn default_guidance() -> f64 {
    8.0
}

fn default_images_per_prompt() -> usize {
    4
}

impl Validation {
    /// Replaces `prompts_file` by the captions in it, so that the configuration of a run does not depend on the file.
    pub(super) fn read_prompts(&mut self, origin: &Origin) -> Result<(), ConfigError> {
        let Some(path) = self.prompts_file.take() else {
            return Ok(());
        };
        self.prompts = prompt_file::read(&path).map_err(|error| ConfigError::Invalid {
            entry: origin.entry("validation.prompts_file", quoted(&path)),
            needs: error.to_string(),
        })?;
        Ok(())
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        if let Some(file) = &self.prompts_file {
            limits.path("validation.prompts_file", Some(file))?;
            let needs = "validation.prompts is set as well; keep one of the two";
            let alone = self.prompts.is_empty();
            return limits.check("validation.prompts_file", quoted(file), alone, needs);
        }
        limits.written("validation.prompts")?;
        let needs = r#"needs at least one caption, as ["red apple"]"#;
        limits.check("validation.prompts", "[]", !self.prompts.is_empty(), needs)
    }
}
