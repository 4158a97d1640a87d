//! `[distill]`: the latent consistency objective.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_GUIDANCE, integer, real};
use super::limits::Limits;

/// Timesteps of Stable Diffusion's noise schedule. `train` checks the solver's points against the teacher's own schedule as
/// well, but only after the models are fetched, and without the line of the file.
const TRAIN_TIMESTEPS: usize = 1000;

/// Bounds of the numbers in `[distill]`. The square of `huber_c` is not 0 in f32.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("distill.num_ddim_timesteps", 1, TRAIN_TIMESTEPS as i64),
    real("distill.w_min", 0.0, MAX_GUIDANCE),
    real("distill.w_max", 0.0, MAX_GUIDANCE),
    real("distill.huber_c", 1e-12, 1000.0),
    real("distill.timestep_scaling", 0.001, 1e6),
    real("distill.ema_decay", 0.0, 1.0),
    real("distill.proportion_empty_prompts", 0.0, 1.0),
];

/// `[distill]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distill {
    /// Points of the DDIM solver over the teacher's 1000 timesteps. `--num_ddim_timesteps`
    pub num_ddim_timesteps: usize,
    /// Least guidance drawn. `--w_min`
    pub w_min: f64,
    /// Greatest guidance drawn. `--w_max`
    pub w_max: f64,
    /// The loss. `--loss_type`
    pub loss: LossKind,
    /// The Huber loss's c. `--huber_c`
    pub huber_c: f64,
    /// Factor on the timestep in the boundary scalings. `--timestep_scaling_factor`
    pub timestep_scaling: f64,
    /// Share of the target UNet kept at each step, 0 to 1. `--ema_decay`
    pub ema_decay: f64,
    /// Share of captions replaced by the empty caption, 0 to 1. `--proportion_empty_prompts`
    pub proportion_empty_prompts: f64,
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            num_ddim_timesteps: 50,
            w_min: 5.0,
            w_max: 15.0,
            loss: LossKind::Huber,
            huber_c: 0.001,
            timestep_scaling: 10.0,
            ema_decay: 0.95,
            proportion_empty_prompts: 0.0,
        }
    }
}

impl Distill {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let points = self.num_ddim_timesteps;
        let ok = TRAIN_TIMESTEPS.is_multiple_of(points);
        let needs = format!("must divide {TRAIN_TIMESTEPS} evenly, as 50 does");
        limits.check("distill.num_ddim_timesteps", points, ok, &needs)?;
        let needs = format!("must not be above distill.w_max = {}", self.w_max);
        let ok = self.w_min <= self.w_max;
        limits.check("distill.w_min", self.w_min, ok, &needs)
    }
}

/// The distance between the student's prediction and its target. The Huber loss's c is a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// Pseudo-Huber, `sqrt(d^2 + c^2) - c`.
    Huber,
    /// Mean squared error.
    L2,
}
