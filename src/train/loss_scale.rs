//! Dynamic loss scaling: small gradients must not vanish in 16 bits, large ones must not overflow.

use serde::{Deserialize, Serialize};

/// The factor of the loss in mixed-precision training with `fp16`: `torch.amp.GradScaler` with its defaults.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct LossScale {
    factor: f64,
    /// Steps made since the factor last changed.
    steps: u64,
}

impl LossScale {
    const START: f64 = 65_536.0;
    /// Steps after which the factor is doubled.
    const GROWS_AFTER: u64 = 2000;
    /// Below this it is not the scale that makes numbers overflow.
    const LEAST: f64 = 1.0;

    pub(super) fn new() -> Self {
        Self {
            factor: Self::START,
            steps: 0,
        }
    }

    /// What the loss is multiplied by.
    pub(super) fn factor(self) -> f64 {
        self.factor
    }

    /// Whether it fell so far that lowering it does not help.
    pub(super) fn exhausted(self) -> bool {
        self.factor < Self::LEAST
    }

    /// After a step whose gradients were finite or not: doubled after enough finite ones, halved by others.
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
    fn the_factor_follows_that_of_pytorch() {
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
