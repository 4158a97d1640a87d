//! Optimiser arithmetic: updates that change a parameter's storage in place, so that a step allocates nothing of the model's
//! size, and the norm that clipping needs.

use candle_core::{DType, Result, Tensor, Var};

use super::{cpu, portable};

/// `target = decay · target + (1 - decay) · source`: the step of an exponential moving average, in the order of operations of
/// the reference's `update_ema`. Both are of one shape and float dtype.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    if on_cpu_in_f32(target) {
        cpu::ema_update(target, source, decay)
    } else {
        portable::ema_update(target, source, decay)
    }
}

/// The sum of the squares of all elements of `x`, of a float dtype. On the CPU an `f32` tensor is summed in `f64`.
///
/// # Errors
/// When `x` is not of a float dtype.
pub fn squared_norm(x: &Tensor) -> Result<f64> {
    if on_cpu_in_f32(x) {
        cpu::squared_norm(x)
    } else {
        portable::squared_norm(x)
    }
}

/// The settings of one AdamW step, shared by all parameters.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the gradient's average.
    pub beta1: f64,
    /// Decay of the squared gradient's average.
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// This step's number, from 1.
    pub step: u64,
}

/// One AdamW update of one parameter and its two moments, in the order of operations of `torch.optim.AdamW`.
///
/// `param`, `moment1`, `moment2` and `grad` are of one shape and float dtype. `grad` is multiplied by `grad_scale` (clipping) as
/// it is read.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn adamw_step(
    param: &Var,
    moment1: &Var,
    moment2: &Var,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let grad = grad.detach().contiguous()?;
    if on_cpu_in_f32(param) {
        cpu::adamw_step(param, moment1, moment2, &grad, grad_scale, step)
    } else {
        portable::adamw_step(param, moment1, moment2, &grad, grad_scale, step)
    }
}

/// Whether the kernels of this file take a tensor.
fn on_cpu_in_f32(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::device;

    #[test]
    fn adamw_steps_equal_those_computed_by_hand() -> Result<()> {
        // torch.optim.AdamW([1., -2.], lr=0.1, weight_decay=0.5) with gradients [0.5, -1.0] then [0.1, 0.3].
        let dev = device();
        let (p, m, v) = (
            Var::new(&[1f32, -2.], &dev)?,
            Var::new(&[0f32; 2], &dev)?,
            Var::new(&[0f32; 2], &dev)?,
        );
        let mut expected = [1f64, -2.];
        let (mut em, mut ev) = ([0f64; 2], [0f64; 2]);
        for (t, g) in [(1u64, [0.5f64, -1.0]), (2, [0.1, 0.3])] {
            let step = AdamWStep {
                learning_rate: 0.1,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.5,
                step: t,
            };
            // The stored gradient is twice the true one: the scale must undo it.
            let stored = Tensor::new(&[2.0 * g[0] as f32, 2.0 * g[1] as f32], &dev)?;
            adamw_step(&p, &m, &v, &stored, 0.5, &step)?;
            for i in 0..2 {
                em[i] = 0.9 * em[i] + 0.1 * g[i];
                ev[i] = 0.999 * ev[i] + 0.001 * g[i] * g[i];
                let (mh, vh) = (
                    em[i] / (1.0 - 0.9f64.powi(t as i32)),
                    ev[i] / (1.0 - 0.999f64.powi(t as i32)),
                );
                expected[i] = expected[i] * (1.0 - 0.05) - 0.1 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (got, want) in p.to_vec1::<f32>()?.iter().zip(expected) {
            assert!((*got as f64 - want).abs() < 1e-6, "{got} {want}");
        }
        Ok(())
    }

    #[test]
    fn ema_update_moves_towards_the_source() -> Result<()> {
        let target = Var::new(&[0f32, 10.], &device())?;
        ema_update(&target, &Tensor::new(&[1f32, 0.], &device())?, 0.75)?;
        assert_eq!(target.to_vec1::<f32>()?, [0.25, 7.5]);
        Ok(())
    }
}
