//! `[validation]`: grids of samples drawn while training. Without the table no grids are drawn.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_GUIDANCE, MAX_STEPS, integer, real};
use super::limits::Limits;

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
    pub prompts: Vec<String>,
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
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let needs = r#"needs at least one caption, as ["red apple"]"#;
        limits.check("validation.prompts", "[]", !self.prompts.is_empty(), needs)
    }
}
