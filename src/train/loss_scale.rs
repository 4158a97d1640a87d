//! Dynamic loss scaling, so that in 16 bits small gradients do not vanish and large ones do not overflow.

use serde::{Deserialize, Serialize};

/// The factor of the loss in mixed-precision training with `fp16`: `torch.amp.GradScaler` with its defaults.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    factor: f64,
    /// Steps made since the factor last changed.
    steps: u64,
}

impl LossScale {
    const START: f64 = 65_536.0;
    /// Steps after which the factor is doubled.
    const GROWS_AFTER: u64 = 2000;
    /// Below this factor the scale is not the cause of an overflow.
    const LEAST: f64 = 1.0;

    pub(super) fn new() -> Self {
        Self {
            factor: Self::START,
            steps: 0,
        }
    }

    /// Factor of the loss.
    pub fn factor(self) -> f64 {
        self.factor
    }

    /// Whether the factor can scale a loss.
    pub(super) fn is_valid(self) -> bool {
        self.factor.is_finite() && self.factor > 0.0
    }

    /// Whether the factor is so small that lowering it does not help.
    pub fn exhausted(self) -> bool {
        self.factor < Self::LEAST
    }

    /// Updates the factor after a step: halved if its gradients were not finite, doubled after enough finite steps.
    pub(super) fn update(&mut self, finite: bool) {
        self.steps += 1;
        if !finite {
            self.factor /= 2.0;
            self.steps = 0;
        } else if self.steps == Self::GROWS_AFTER {
            self.factor *= 2.0;
            self.steps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_scale_follows_pytorch() {
        // torch.amp.GradScaler over the same steps: 65536, halved twice, then 2000 finite steps double it.
        let mut scale = LossScale::new();
        scale.update(true);
        scale.update(false);
        scale.update(false);
        assert_eq!(scale.factor(), 16_384.0);
        for _ in 0..1999 {
            scale.update(true);
        }
        assert_eq!(scale.factor(), 16_384.0);
        scale.update(true);
        assert_eq!(scale.factor(), 32_768.0);
        for _ in 0..15 {
            scale.update(false);
            assert!(!scale.exhausted());
        }
        scale.update(false);
        assert!(scale.exhausted());
    }
}
