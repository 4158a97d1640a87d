//! `[distill]`: the objective.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::limits::Limits;

/// Timesteps of Stable Diffusion's noise schedule. `train` checks the solver's points against the teacher's own schedule as
/// well, but only after the models are fetched, and without the line of the file.
const TRAIN_TIMESTEPS: usize = 1000;

/// `[distill]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distill {
    /// What a step minimises.
    pub objective: ObjectiveKind,
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
    /// Factor on the timestep in the boundary scalings of `lcm`. `--timestep_scaling_factor`
    pub timestep_scaling: f64,
    /// Stochasticity of the sampler of `tcd`, 0 to 1; 0.3 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcd_gamma: Option<f64>,
    /// Number of phases of `pcm`; 4 if unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phases: Option<usize>,
    /// Share of the target UNet kept at each step, 0 to 1. `--ema_decay`
    pub ema_decay: f64,
    /// Share of captions replaced by the empty caption, 0 to 1. `--proportion_empty_prompts`
    pub proportion_empty_prompts: f64,
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            objective: ObjectiveKind::Lcm,
            num_ddim_timesteps: 50,
            w_min: 5.0,
            w_max: 15.0,
            loss: LossKind::Huber,
            huber_c: 0.001,
            timestep_scaling: 10.0,
            tcd_gamma: None,
            phases: None,
            ema_decay: 0.95,
            proportion_empty_prompts: 0.0,
        }
    }
}

impl Distill {
    /// Stochasticity of the sampler of `tcd`, 0 to 1.
    #[must_use]
    pub fn tcd_gamma(&self) -> f64 {
        self.tcd_gamma.unwrap_or(0.3)
    }

    /// Number of phases of `pcm`.
    #[must_use]
    pub fn phases(&self) -> usize {
        self.phases.unwrap_or(4)
    }

    /// Checks the keys of single objectives.
    fn check_objective(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let scaling = self.timestep_scaling;
        let scaling = (scaling != Self::default().timestep_scaling).then_some(scaling);
        for (owner, key, value) in [
            (
                ObjectiveKind::Lcm,
                "distill.timestep_scaling",
                scaling.map(|x| x.to_string()),
            ),
            (
                ObjectiveKind::Tcd,
                "distill.tcd_gamma",
                self.tcd_gamma.map(|x| x.to_string()),
            ),
            (
                ObjectiveKind::Pcm,
                "distill.phases",
                self.phases.map(|x| x.to_string()),
            ),
        ] {
            let objective = self.objective;
            let needs = format!(
                "belongs to distill.objective = \"{}\", and the objective is \"{}\"",
                owner.name(),
                objective.name()
            );
            let ok = value.is_none() || objective == owner;
            limits.check(key, value.unwrap_or_default(), ok, &needs)?;
        }
        limits.fraction("distill.tcd_gamma", self.tcd_gamma())?;
        let phases = self.phases();
        let ok = (1..=self.num_ddim_timesteps).contains(&phases);
        let needs = format!(
            "must be between 1 and distill.num_ddim_timesteps = {}",
            self.num_ddim_timesteps
        );
        limits.check("distill.phases", phases, ok, &needs)
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let points = self.num_ddim_timesteps;
        let ok = points > 0 && TRAIN_TIMESTEPS.is_multiple_of(points);
        let needs = format!("must divide {TRAIN_TIMESTEPS} evenly, as 50 does");
        limits.check("distill.num_ddim_timesteps", points, ok, &needs)?;
        self.check_objective(limits)?;
        limits.not_negative("distill.w_min", self.w_min)?;
        limits.not_negative("distill.w_max", self.w_max)?;
        let needs = format!("must not be above distill.w_max = {}", self.w_max);
        let ok = self.w_min <= self.w_max;
        limits.check("distill.w_min", self.w_min, ok, &needs)?;
        limits.above_zero("distill.huber_c", self.huber_c)?;
        limits.above_zero("distill.timestep_scaling", self.timestep_scaling)?;
        limits.fraction("distill.ema_decay", self.ema_decay)?;
        limits.fraction(
            "distill.proportion_empty_prompts",
            self.proportion_empty_prompts,
        )
    }
}

/// What a step minimises; each objective has keys of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// Latent consistency: every point of the trajectory predicts its end.
    Lcm,
    /// Trajectory consistency: every point predicts a random later point.
    Tcd,
    /// Phased consistency: every point predicts the end of its phase.
    Pcm,
}

impl ObjectiveKind {
    /// The name in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lcm => "lcm",
            Self::Tcd => "tcd",
            Self::Pcm => "pcm",
        }
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
