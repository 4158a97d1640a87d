//! `[distill]`: the objective.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_GUIDANCE, integer, real};
use super::limits::Limits;

/// Timesteps of Stable Diffusion's noise schedule. `train` checks the solver's points against the teacher's own schedule as
/// well, but only after the models are fetched, and without the line of the file.
const TRAIN_TIMESTEPS: usize = 1000;

/// Stochasticity of the sampler of `tcd`, unless it is set. The default of diffusers' `TCDScheduler`.
pub const TCD_GAMMA: f64 = 0.3;

/// Bounds of the numbers in `[distill]`. The square of `huber_c` is not 0 in f32.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("distill.num_ddim_timesteps", 1, TRAIN_TIMESTEPS as i64),
    real("distill.w_min", 0.0, MAX_GUIDANCE),
    real("distill.w_max", 0.0, MAX_GUIDANCE),
    real("distill.huber_c", 1e-12, 1000.0),
    real("distill.timestep_scaling", 0.001, 1e6),
    real("distill.tcd_gamma", 0.0, 1.0),
    integer("distill.phases", 1, TRAIN_TIMESTEPS as i64),
    real("distill.ema_decay", 0.0, 1.0),
    real("distill.proportion_empty_prompts", 0.0, 1.0),
];

/// `[distill]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distill {
    /// The loss that a step minimises.
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
    /// Share of the target UNet kept at each step, 0 to 1; 0.95 if unset. Not with `[lora]`. `--ema_decay`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// Share of captions replaced by the empty caption, 0 to 1. `--proportion_empty_prompts`
    pub proportion_empty_prompts: f64,
    /// Conditioning of the teacher's unconditional pass. No flag.
    pub uncond: Uncond,
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
            ema_decay: None,
            proportion_empty_prompts: 0.0,
            uncond: Uncond::Auto,
        }
    }
}

impl Distill {
    /// Writes the defaults of the objective's own keys, so that they are the same whether they were written or not.
    pub(super) fn fill(&mut self) {
        match self.objective {
            ObjectiveKind::Lcm => {}
            ObjectiveKind::Tcd => self.tcd_gamma = Some(self.tcd_gamma()),
            ObjectiveKind::Pcm => self.phases = Some(self.phases()),
        }
    }

    /// Stochasticity of the sampler of `tcd`, 0 to 1.
    #[must_use]
    pub fn tcd_gamma(&self) -> f64 {
        self.tcd_gamma.unwrap_or(TCD_GAMMA)
    }

    /// Share of the target UNet kept at each step of a wholly trained student, 0 to 1.
    #[must_use]
    pub fn ema_decay(&self) -> f64 {
        self.ema_decay.unwrap_or(0.95)
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
        let (phases, points) = (self.phases(), self.num_ddim_timesteps);
        let ok = self.objective != ObjectiveKind::Pcm || phases <= points;
        let needs = format!("must be at most distill.num_ddim_timesteps = {points}");
        limits.check("distill.phases", phases, ok, &needs)
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let points = self.num_ddim_timesteps;
        let ok = TRAIN_TIMESTEPS.is_multiple_of(points);
        let needs = format!("must divide {TRAIN_TIMESTEPS} evenly, as 50 does");
        limits.check("distill.num_ddim_timesteps", points, ok, &needs)?;
        self.check_objective(limits)?;
        let needs = format!("must not be above distill.w_max = {}", self.w_max);
        let ok = self.w_min <= self.w_max;
        limits.check("distill.w_min", self.w_min, ok, &needs)
    }
}

/// Conditioning of the teacher's unconditional pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Uncond {
    /// As the teacher's pipeline has it: zeros for SDXL, unless its `model_index.json` says otherwise, else the empty caption.
    Auto,
    /// The empty caption, encoded.
    Empty,
    /// Zeros in place of the embeddings.
    Zeros,
}

/// The loss that a step minimises; each objective has keys of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// Latent consistency: every point of the trajectory predicts its end.
    #[default]
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
