//! [`ops::update`](crate::ops::update) on the CPU, for one `f32` tensor.

use candle_core::{
    CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor, Var, backend::BackendStorage, bail,
};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::kernel::{TensorView, slice};
use super::reduce::sum1;
use crate::ops::AdamWStep;
use crate::ops::update::Factors;

/// Elements that one task updates.
const CHUNK: usize = 1 << 14;

/// As [`crate::ops::update::ema_update()`].
pub(in crate::ops) fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    let (weight, decay) = ((1.0 - decay) as f32, decay as f32);
    target.inplace_op2(&source.detach().contiguous()?, &Ema { decay, weight })
}

/// As [`crate::ops::update::squared_norm()`].
pub(in crate::ops) fn squared_norm(x: &Tensor) -> Result<f64> {
    let x = x.contiguous()?;
    let view = TensorView::of(&x);
    let parts = view.slice::<f32>()?.par_chunks(CHUNK).map(sum_of_squares);
    // Collected before it is summed: the order of the sum must not depend on the threads.
    Ok(parts.collect::<Vec<f64>>().into_iter().sum())
}

/// As [`crate::ops::update::adamw_step()`].
pub(in crate::ops) fn adamw_step(
    param: &Var,
    moment1: &Var,
    moment2: &Var,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let factors = Factors::new(step, grad_scale);
    moment1.inplace_op2(grad, &Average(factors))?;
    moment2.inplace_op2(grad, &SquareAverage(factors))?;
    param.inplace_op3(
        &moment1.as_detached_tensor(),
        &moment2.as_detached_tensor(),
        &AdamWUpdate(factors),
    )
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
