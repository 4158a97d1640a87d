//! Nearest-neighbour upsampling.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

use super::cpu::{Real, View, by_dtype, has_kernel, slice};

/// Doubles height and width by repeating pixels, as `F.interpolate(scale_factor=2, mode="nearest")`.
///
/// `x`: `[B, C, H, W]` → `[B, C, 2H, 2W]`. Candle's own upsampling overwrites its gradient instead of adding to it.
///
/// # Errors
/// When `x` is not of rank 4.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    x.dims4()?;
    if has_kernel(x) {
        return x.contiguous()?.apply_op1(Upsample);
    }
    super::tensor::upsample_nearest_2x(x)
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample_nearest_2x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(x: &CpuStorage, layout: &Layout, w: usize) -> Result<CpuStorage> {
            let x = slice::<T>(x, layout)?;
            let mut out = vec![T::zero(); 4 * x.len()];
            out.par_chunks_mut(4 * w)
                .zip(x.par_chunks(w))
                .for_each(|(out, row)| {
                    let (first, second) = out.split_at_mut(2 * w);
                    for (pair, &x) in first.chunks_exact_mut(2).zip(row) {
                        pair.fill(x);
                    }
                    second.copy_from_slice(first);
                });
            Ok(T::to_cpu_storage_owned(out))
        }
        let (b, c, h, w) = layout.shape().dims4()?;
        let out = by_dtype!(x.dtype(), self.name(), run(x, layout, w))?;
        Ok((out, Shape::from((b, c, 2 * h, 2 * w))))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        fn run<T: Real>(x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let w = x.dims4()?.3;
            let view = View::of(grad);
            let grad = view.slice::<T>()?;
            let mut out = vec![T::zero(); grad.len() / 4];
            out.par_chunks_mut(w)
                .zip(grad.par_chunks(4 * w))
                .for_each(|(out, grad)| {
                    let (first, second) = grad.split_at(2 * w);
                    for ((o, a), b) in out
                        .iter_mut()
                        .zip(first.chunks_exact(2))
                        .zip(second.chunks_exact(2))
                    {
                        *o = a[0] + a[1] + b[0] + b[1];
                    }
                });
            Ok(Some(Tensor::from_vec(out, x.dims(), x.device())?))
        }
        by_dtype!(x.dtype(), self.name(), run(x, &grad.contiguous()?))
    }
}
