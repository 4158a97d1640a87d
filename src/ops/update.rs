//! Optimiser arithmetic over all tensors of a set: updates that change storage in place, so that a step allocates nothing of
//! the model's size, and the norm that clipping needs.

use candle_core::{DType, Result, Tensor, Var, bail};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::cuda;
use super::{BlockMoments, adamw8bit, cast, cpu, portable};

/// One tensor of a moving average.
#[derive(Clone, Copy, Debug)]
pub struct EmaUpdate<'a> {
    /// The average.
    pub target: &'a Var,
    /// The tensor that the target moves towards, of the target's shape and dtype.
    pub source: &'a Tensor,
}

/// `target = decay · target + (1 - decay) · source` for each tensor: the step of an exponential moving average, in the order of
/// operations of the reference's `update_ema`.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn ema_updates(updates: &[EmaUpdate<'_>], decay: f64) -> Result<()> {
    for update in updates {
        check_size(update.target, "a source", update.source)?;
    }
    #[cfg(feature = "cuda")]
    if cuda::has_update_kernel(
        updates
            .iter()
            .flat_map(|u| [u.target.as_tensor(), u.source]),
    ) {
        return cuda::ema_updates(updates, decay);
    }
    updates
        .par_iter()
        .try_for_each(|update| ema_update(update.target, update.source, decay))
}

/// The sum of the squares of each tensor's elements, in `f64`. The tensors are of float dtypes. Each sum depends on its tensor alone.
///
/// # Errors
/// When a tensor is not of a float dtype.
pub fn squared_norms(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    #[cfg(feature = "cuda")]
    if tensors.iter().all(|x| cuda::has_kernel(x)) {
        return cuda::squared_norms(tensors);
    }
    tensors.par_iter().map(|x| squared_norm(x)).collect()
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

/// Moving averages of a parameter's gradient and of its square.
#[derive(Debug)]
pub enum AdamWMoments {
    /// In the parameter's type and shape.
    Full {
        /// The gradient's average.
        first: Var,
        /// The squared gradient's average.
        second: Var,
    },
    /// In 8 bits. The parameter is `f32`.
    Blocks(BlockMoments),
}

/// One parameter of a step of AdamW.
#[derive(Debug)]
pub struct AdamWUpdate<'a> {
    /// The parameter.
    pub param: &'a Var,
    /// Its moments.
    pub moments: &'a mut AdamWMoments,
    /// Its gradient, of its shape. On the CPU of its dtype.
    pub grad: &'a Tensor,
    /// A copy of the parameter in another type, to be refreshed.
    pub copy: Option<&'a Var>,
}

/// One AdamW step of every parameter, in the order of operations of `torch.optim.AdamW`, or with moments in 8 bits of
/// bitsandbytes' `AdamW8bit`.
///
/// Gradients are multiplied by `grad_scale` (clipping) as they are read.
///
/// # Errors
/// When shapes or dtypes do not fit together.
pub fn adamw_steps(
    updates: &mut [AdamWUpdate<'_>],
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    for update in &*updates {
        check_size(update.param, "a gradient", update.grad)?;
        check_copy(update.param, update.copy)?;
    }
    #[cfg(feature = "cuda")]
    if cuda::has_update_kernel(updates.iter().map(|u| u.param.as_tensor()))
        && updates.iter().all(|u| cuda::has_kernel(u.grad))
    {
        return cuda::adamw_steps(updates, grad_scale, step);
    }
    // In parallel over tensors: most are too small to be split.
    updates.par_iter_mut().try_for_each(|update| {
        let (param, grad) = (update.param, update.grad);
        match &mut *update.moments {
            AdamWMoments::Full { first, second } => {
                adamw_step(param, first, second, grad, grad_scale, step)
            }
            AdamWMoments::Blocks(moments) => {
                adamw8bit::adamw8bit_step(param, moments, grad, grad_scale, step)
            }
        }?;
        refresh(update.copy, param)
    })
}

fn check_size(updated: &Var, what: &str, other: &Tensor) -> Result<()> {
    if updated.shape() != other.shape() {
        let (of, shape) = (updated.dims(), other.dims());
        bail!("an update of {of:?} with {what} of {shape:?}");
    }
    Ok(())
}

fn check_copy(of: &Var, copy: Option<&Var>) -> Result<()> {
    copy.map_or(Ok(()), |copy| check_size(of, "a copy", copy))
}

fn refresh(copy: Option<&Var>, of: &Var) -> Result<()> {
    copy.map_or(Ok(()), |copy| {
        copy.set(&cast(&of.as_detached_tensor(), copy.dtype())?)
    })
}

/// [`ema_updates`] of one tensor.
pub(super) fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    if on_cpu_in_f32(target) {
        cpu::ema_update(target, source, decay)
    } else {
        portable::ema_update(target, source, decay)
    }
}

/// [`global_squared_norm`] of one tensor.
pub(super) fn squared_norm(x: &Tensor) -> Result<f64> {
    if on_cpu_in_f32(x) {
        cpu::squared_norm(x)
    } else {
        portable::squared_norm(x)
    }
}

/// [`adamw_steps`] of one parameter with full moments.
pub(super) fn adamw_step(
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

/// The factors of a step, computed in `f64` and rounded once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factors {
    pub(super) grad_scale: f32,
    pub(super) weight1: f32,
    pub(super) beta2: f32,
    pub(super) weight2: f32,
    pub(super) keep: f32,
    pub(super) step_size: f32,
    pub(super) root_correction2: f32,
    pub(super) epsilon: f32,
}

impl Factors {
    pub(super) fn new(step: &AdamWStep, grad_scale: f64) -> Self {
        let correction1 = 1.0 - step.beta1.powf(step.step as f64);
        let correction2 = 1.0 - step.beta2.powf(step.step as f64);
        Self {
            grad_scale: grad_scale as f32,
            weight1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            weight2: (1.0 - step.beta2) as f32,
            keep: (1.0 - step.learning_rate * step.weight_decay) as f32,
            step_size: (step.learning_rate / correction1) as f32,
            root_correction2: correction2.sqrt() as f32,
            epsilon: step.epsilon as f32,
        }
    }

    /// `m + (1 - beta1) · (grad - m)`.
    #[inline(always)]
    pub(super) fn average(&self, m: f32, grad: f32) -> f32 {
        m + self.weight1 * (grad * self.grad_scale - m)
    }

    /// `beta2 · v + (1 - beta2) · grad²`.
    #[inline(always)]
    pub(super) fn square_average(&self, v: f32, grad: f32) -> f32 {
        let g = grad * self.grad_scale;
        self.beta2 * v + self.weight2 * g * g
    }

    /// `keep · p - step_size · m / (√v / √(1 - beta2ᵗ) + epsilon)`.
    #[inline(always)]
    pub(super) fn updated(&self, p: f32, m: f32, v: f32) -> f32 {
        let denominator = v.sqrt() / self.root_correction2 + self.epsilon;
        p * self.keep - self.step_size * m / denominator
    }
}

/// Whether the CPU's kernels take a tensor.
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
