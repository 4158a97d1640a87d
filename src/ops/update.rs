//! Optimiser arithmetic: updates that change a parameter's storage in place, so that a step allocates nothing of the model's
//! size, and the norm that clipping needs.

use candle_core::{
    CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var,
    backend::BackendStorage, bail,
};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::cpu::sum1;
use super::kernel::{View, has_kernel, slice};

/// Elements a task updates.
const CHUNK: usize = 1 << 14;

/// `target = decay · target + (1 - decay) · source`: the step of an exponential moving average, in the order of operations of
/// the reference's `update_ema`.
///
/// # Errors
/// When shapes or dtypes differ.
pub fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    let weight = 1.0 - decay;
    if has_kernel(target) && target.dtype() == DType::F32 {
        let (decay, weight) = (decay as f32, weight as f32);
        return target.inplace_op2(&source.detach().contiguous()?, &Ema { decay, weight });
    }
    super::tensor::ema_update(target, source, decay)
}

/// The sum of the squares of a tensor's elements, accumulated in `f64`.
///
/// # Errors
/// When the tensor can't be read.
pub fn squared_norm(x: &Tensor) -> Result<f64> {
    if has_kernel(x) && x.dtype() == DType::F32 {
        let x = x.contiguous()?;
        let view = View::of(&x);
        let parts = view.slice::<f32>()?.par_chunks(CHUNK).map(sum_of_squares);
        // Collected before it is summed: the order of the sum must not depend on the threads.
        return Ok(parts.collect::<Vec<f64>>().into_iter().sum());
    }
    super::tensor::squared_norm(x)
}

/// The numbers of one AdamW step, shared by all parameters.
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
/// `grad` is multiplied by `grad_scale` (clipping) as it is read.
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
    if has_kernel(param) && param.dtype() == DType::F32 {
        let factors = Factors::new(step, grad_scale);
        moment1.inplace_op2(&grad, &Average(factors))?;
        moment2.inplace_op2(&grad, &SquareAverage(factors))?;
        return param.inplace_op3(
            &moment1.as_detached_tensor(),
            &moment2.as_detached_tensor(),
            &AdamWUpdate(factors),
        );
    }
    super::tensor::adamw_step(param, moment1, moment2, &grad, grad_scale, step)
}

/// What a step multiplies with, taken in `f64` before rounding.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    grad_scale: f32,
    weight1: f32,
    beta2: f32,
    weight2: f32,
    keep: f32,
    step_size: f32,
    root_correction2: f32,
    epsilon: f32,
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

/// The elements of a contiguous `f32` storage, to write.
pub(super) fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        (other, _) => bail!(
            "an in-place update needs contiguous f32, not {:?}",
            other.dtype()
        ),
    }
}

fn zip2(
    dst: (&mut CpuStorage, &Layout),
    src: (&CpuStorage, &Layout),
    f: impl Fn(&mut f32, f32) + Sync,
) -> Result<()> {
    let dst = slice_mut(dst.0, dst.1)?;
    let src = slice::<f32>(src.0, src.1)?;
    if dst.len() != src.len() {
        bail!(
            "an in-place update of {} elements with {}",
            dst.len(),
            src.len()
        );
    }
    dst.par_chunks_mut(CHUNK)
        .zip(src.par_chunks(CHUNK))
        .for_each(|(dst, src)| zip_chunk(dst, src, &f));
    Ok(())
}

#[pulp::with_simd(zip_chunk = Arch::new())]
#[inline(always)]
fn zip_chunk_on<S: Simd, F: Fn(&mut f32, f32)>(_: S, dst: &mut [f32], src: &[f32], f: &F) {
    for (d, &s) in dst.iter_mut().zip(src) {
        f(d, s);
    }
}

#[pulp::with_simd(sum_of_squares = Arch::new())]
#[inline(always)]
fn sum_of_squares_on<S: Simd>(_: S, x: &[f32]) -> f64 {
    sum1(x, |x| x * x)
}

struct Ema {
    decay: f32,
    weight: f32,
}

impl InplaceOp2 for Ema {
    fn name(&self) -> &'static str {
        "ema_update"
    }

    fn cpu_fwd(&self, d: &mut CpuStorage, dl: &Layout, s: &CpuStorage, sl: &Layout) -> Result<()> {
        let Self { decay, weight } = *self;
        // One rounding, as in PyTorch's `add_(…, alpha=…)`.
        zip2((d, dl), (s, sl), |d, s| *d = weight.mul_add(s, *d * decay))
    }
}

struct Average(Factors);

impl InplaceOp2 for Average {
    fn name(&self) -> &'static str {
        "adamw_average"
    }

    fn cpu_fwd(&self, d: &mut CpuStorage, dl: &Layout, s: &CpuStorage, sl: &Layout) -> Result<()> {
        let by = self.0;
        zip2((d, dl), (s, sl), |d, s| *d = by.average(*d, s))
    }
}

struct SquareAverage(Factors);

impl InplaceOp2 for SquareAverage {
    fn name(&self) -> &'static str {
        "adamw_square_average"
    }

    fn cpu_fwd(&self, d: &mut CpuStorage, dl: &Layout, s: &CpuStorage, sl: &Layout) -> Result<()> {
        let by = self.0;
        zip2((d, dl), (s, sl), |d, s| *d = by.square_average(*d, s))
    }
}

struct AdamWUpdate(Factors);

impl InplaceOp3 for AdamWUpdate {
    fn name(&self) -> &'static str {
        "adamw_update"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        pl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<()> {
        let p = slice_mut(p, pl)?;
        let m = slice::<f32>(m, ml)?;
        let v = slice::<f32>(v, vl)?;
        if p.len() != m.len() || p.len() != v.len() {
            bail!(
                "AdamW: {} parameters, moments of {} and {}",
                p.len(),
                m.len(),
                v.len()
            );
        }
        p.par_chunks_mut(CHUNK)
            .zip(m.par_chunks(CHUNK).zip(v.par_chunks(CHUNK)))
            .for_each(|(p, (m, v))| update_chunk(p, m, v, &self.0));
        Ok(())
    }
}

#[pulp::with_simd(update_chunk = Arch::new())]
#[inline(always)]
fn update_chunk_on<S: Simd>(_: S, p: &mut [f32], m: &[f32], v: &[f32], by: &Factors) {
    for ((p, &m), &v) in p.iter_mut().zip(m).zip(v) {
        *p = by.updated(*p, m, v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn adamw_matches_hand_computed_steps() -> Result<()> {
        // torch.optim.AdamW([1., -2.], lr=0.1, weight_decay=0.5) with gradients [0.5, -1.0] then [0.1, 0.3].
        let dev = Device::Cpu;
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
    fn an_average_moves_towards_its_source() -> Result<()> {
        let target = Var::new(&[0f32, 10.], &Device::Cpu)?;
        ema_update(&target, &Tensor::new(&[1f32, 0.], &Device::Cpu)?, 0.75)?;
        assert_eq!(target.to_vec1::<f32>()?, [0.25, 7.5]);
        Ok(())
    }
}
