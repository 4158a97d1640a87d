//! Gated activations.

use candle_core::{
    CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, backend::BackendStorage,
};
use rayon::prelude::*;

use super::cpu::{Real, View, by_dtype, has_kernel, real, slice, vectorised};

/// Gated GELU: the first half of the last dimension times the exact GELU of the second, as diffusers' `GEGLU`.
///
/// `x`: `[…, 2·C]` → `[…, C]`.
///
/// # Errors
/// When the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if !width.is_multiple_of(2) {
        candle_core::bail!("geglu: the last dimension of {:?} is odd", x.dims());
    }
    if has_kernel(x) {
        return x.contiguous()?.apply_op1(Geglu);
    }
    super::tensor::geglu(x)
}

/// `Φ(x)`, the normal distribution function.
#[inline(always)]
fn normal_cdf<T: Real>(x: T) -> T {
    let half: T = real(0.5);
    half + half * (x * T::FRAC_1_SQRT_2()).fast_erf()
}

/// Rows a task works on.
const ROWS: usize = 64;

struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(x: &CpuStorage, layout: &Layout, c: usize) -> Result<CpuStorage> {
            let x = slice::<T>(x, layout)?;
            let mut out = vec![T::zero(); x.len() / 2];
            out.par_chunks_mut(ROWS * c)
                .zip(x.par_chunks(ROWS * 2 * c))
                .for_each(|(out, x)| {
                    vectorised(|| {
                        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
                            let (value, gate) = x.split_at(c);
                            for ((o, &v), &g) in out.iter_mut().zip(value).zip(gate) {
                                *o = v * g * normal_cdf(g);
                            }
                        }
                    });
                });
            Ok(T::to_cpu_storage_owned(out))
        }
        let mut dims = layout.dims().to_vec();
        let c = dims.last().map_or(0, |d| d / 2);
        if let Some(last) = dims.last_mut() {
            *last = c;
        }
        let out = by_dtype!(x.dtype(), self.name(), run(x, layout, c))?;
        Ok((out, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        fn run<T: Real>(x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let c = x.dim(D::Minus1)? / 2;
            let (xv, gv) = (View::of(x), View::of(grad));
            let (xs, gs) = (xv.slice::<T>()?, gv.slice::<T>()?);
            let mut out = vec![T::zero(); xs.len()];
            out.par_chunks_mut(ROWS * 2 * c)
                .zip(xs.par_chunks(ROWS * 2 * c).zip(gs.par_chunks(ROWS * c)))
                .for_each(|(out, (x, grad))| {
                    vectorised(|| {
                        let density: T = real(1.0 / (2.0 * std::f64::consts::PI).sqrt());
                        let rows = out.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c));
                        for ((out, x), grad) in rows.zip(grad.chunks_exact(c)) {
                            let ((dv, dg), (value, gate)) = (out.split_at_mut(c), x.split_at(c));
                            for i in 0..c {
                                let (v, g, grad) = (value[i], gate[i], grad[i]);
                                let cdf = normal_cdf(g);
                                let pdf = density * (g * g * real(-0.5)).fast_exp();
                                dv[i] = grad * g * cdf;
                                dg[i] = grad * v * (cdf + g * pdf);
                            }
                        }
                    });
                });
            Ok(Some(Tensor::from_vec(out, x.dims(), x.device())?))
        }
        by_dtype!(x.dtype(), self.name(), run(x, &grad.contiguous()?))
    }
}
