//! `[optimizer]`: AdamW, gradient clipping and the learning-rate schedule.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_STEPS, integer, real};
use super::limits::Limits;

/// Bounds of the numbers in `[optimizer]`.
pub(super) const NUMBERS: &[Bounds] = &[
    real("optimizer.learning_rate", 1e-20, 10.0),
    real("optimizer.beta1", 0.0, 0.999_999),
    real("optimizer.beta2", 0.0, 0.999_999),
    real("optimizer.weight_decay", 0.0, 100.0),
    real("optimizer.epsilon", 1e-30, 1.0),
    real("optimizer.max_grad_norm", 1e-12, 1e30),
    integer("optimizer.warmup_steps", 0, MAX_STEPS),
];

/// `[optimizer]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Optimizer {
    /// The optimiser. `--use_8bit_adam`
    pub kind: OptimizerKind,
    /// Learning rate after any warmup. `--learning_rate`
    pub learning_rate: f64,
    /// Decay of the first moment. `--adam_beta1`
    pub beta1: f64,
    /// Decay of the second moment. `--adam_beta2`
    pub beta2: f64,
    /// Decoupled weight decay. `--adam_weight_decay`
    pub weight_decay: f64,
    /// Term that keeps the division finite. `--adam_epsilon`
    pub epsilon: f64,
    /// Norm gradients are clipped to, over all variables together. `--max_grad_norm`
    pub max_grad_norm: f64,
    /// How the learning rate changes. `--lr_scheduler`
    pub schedule: Schedule,
    /// Steps of the warmup, for schedules that have one. `--lr_warmup_steps`
    pub warmup_steps: u64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            weight_decay: 0.0,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            schedule: Schedule::Constant,
            warmup_steps: 0,
        }
    }
}

impl Optimizer {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let steps = self.warmup_steps;
        let ok = steps == 0 || self.schedule != Schedule::Constant;
        let needs = r#"has no effect with optimizer.schedule = "constant"; use another, as "constant_with_warmup""#;
        limits.check("optimizer.warmup_steps", steps, ok, needs)
    }
}

/// The optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW with its state in f32.
    AdamW,
    /// AdamW with its state in 8 bits, a quarter of the memory.
    AdamW8bit,
}

/// How the learning rate changes over the run; diffusers' schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The same from the first step to the last.
    Constant,
    /// Rises linearly for `optimizer.warmup_steps`, then stays.
    ConstantWithWarmup,
    /// Warms up, then falls linearly to 0.
    Linear,
    /// Warms up, then falls to 0 along half a cosine.
    Cosine,
    /// As `Cosine`; the number of restarts is diffusers' default of one cycle.
    CosineWithRestarts,
    /// Warms up, then falls linearly (power 1, diffusers' default) to 1e-7.
    Polynomial,
}

impl Schedule {
    /// Whether the learning rate of a step depends on `train.max_steps`.
    pub(super) fn depends_on_max_steps(self) -> bool {
        !matches!(self, Self::Constant | Self::ConstantWithWarmup)
    }
}
