//! `[lora]`: training of a LoRA in place of the whole UNet. Without the table every tensor is trained.

use serde::{Deserialize, Serialize};

use super::bounds::{Bounds, integer, real};
use super::limits::Limits;
use super::{ConfigError, FloatType};
use crate::lora::DEFAULT_TARGETS;

/// Learning rate of a LoRA, unless `optimizer.learning_rate` is set.
pub(super) const LEARNING_RATE: f64 = 1e-4;

/// Guidance of the validation grids of a LoRA, unless `validation.guidance` is set: none, since the student's output has it.
pub(super) const GUIDANCE: f64 = 1.0;

/// Bounds of the numbers in `[lora]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("lora.rank", 1, 4096),
    real("lora.alpha", 1e-3, 1e6),
    real("lora.dropout", 0.0, 0.99),
];

/// `[lora]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank of the adapters. `--lora_rank`
    pub rank: usize,
    /// The adapters' output is multiplied by `alpha / rank`; the rank if unset. `--lora_alpha`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Share of the numbers at the input of an adapter that is set to 0 in training, 0 to 0.99. `--lora_dropout`
    pub dropout: f64,
    /// Modules of the UNet that have an adapter: those with such a name, and those whose name ends with it after a dot.
    /// `--lora_target_modules`
    pub targets: Vec<String>,
    /// Layouts that the finished LoRA is written in.
    pub save: Vec<LoraLayout>,
    /// Type of the finished LoRA. Checkpoints are f32.
    pub save_dtype: FloatType,
}

/// Layout of a file with a LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraLayout {
    /// diffusers' and PEFT's: `unet.MODULE.lora_A.weight`.
    Peft,
    /// kohya's, which AUTOMATIC1111 and ComfyUI read too: `lora_unet_MODULE.lora_down.weight`.
    Kohya,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 64,
            alpha: None,
            dropout: 0.0,
            targets: DEFAULT_TARGETS.map(str::to_owned).into(),
            save: vec![LoraLayout::Peft, LoraLayout::Kohya],
            save_dtype: FloatType::F16,
        }
    }
}

impl Lora {
    /// Numerator of the factor of the adapters' output, whose denominator is the rank.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(self.rank as f64)
    }

    /// Writes the default of `alpha`, so that it is the same whether it was written or not.
    pub(super) fn fill(&mut self) {
        self.alpha = Some(self.alpha());
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        limits.words("lora.targets", &self.targets)?;
        let ok = !self.save.is_empty();
        limits.check(
            "lora.save",
            "[]",
            ok,
            "must name \"peft\", \"kohya\" or both",
        )
    }
}
