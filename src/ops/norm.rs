//! Group and layer normalisation.

use candle_core::{
    CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, backend::BackendStorage,
};
use rayon::prelude::*;

use super::cpu::{
    Grads3, Real, View, by_dtype, has_kernel, real, sigmoid, slice, sum1, sum2, vectorised,
};

/// Group normalisation over channels and space, with the SiLU that follows it in every residual block fused on demand.
///
/// `x`: `[B, C, …]`, `weight` and `bias`: `[C]` → `[B, C, …]`. As `torch.nn.functional.group_norm`.
///
/// # Errors
/// When `groups` does not divide the channels or the shapes do not fit together.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let c = x.dim(1)?;
    if groups == 0 || !c.is_multiple_of(groups) || weight.dims() != [c] || bias.dims() != [c] {
        candle_core::bail!(
            "group_norm: x is {:?}, weight {:?}, {groups} groups",
            x.dims(),
            weight.dims()
        );
    }
    if has_kernel(x) {
        let op = GroupNorm { groups, eps, silu };
        return x
            .contiguous()?
            .apply_op3(&weight.contiguous()?, &bias.contiguous()?, op);
    }
    super::tensor::group_norm(x, weight, bias, groups, eps, silu)
}

/// Layer normalisation over the last dimension, as `torch.nn.functional.layer_norm`.
///
/// `x`: `[…, C]`, `weight` and `bias`: `[C]` → `[…, C]`.
///
/// # Errors
/// When the shapes do not fit together.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let c = x.dim(D::Minus1)?;
    if weight.dims() != [c] || bias.dims() != [c] {
        candle_core::bail!(
            "layer_norm: x is {:?}, weight {:?}",
            x.dims(),
            weight.dims()
        );
    }
    if has_kernel(x) {
        return x.contiguous()?.apply_op3(
            &weight.contiguous()?,
            &bias.contiguous()?,
            LayerNorm { eps },
        );
    }
    super::tensor::layer_norm(x, weight, bias, eps)
}

/// Mean and reciprocal standard deviation (biased) of a slice.
#[inline(always)]
fn statistics<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = x.len() as f64;
    let mean: T = real(sum1(x, |x| x) / n);
    let variance = sum1(x, |x| (x - mean) * (x - mean)) / n;
    (mean, real(1.0 / (variance + eps).sqrt()))
}

/// Sums rows of `[rows, width]` in order.
fn sum_rows<T: Real>(parts: &[T], width: usize) -> Vec<T> {
    let mut total = vec![0f64; width];
    for part in parts.chunks_exact(width) {
        for (t, p) in total.iter_mut().zip(part) {
            *t += (*p).to_f64();
        }
    }
    total.into_iter().map(real).collect()
}

struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
}

impl GroupNorm {
    /// Channels of a group and pixels of a channel.
    fn sizes(&self, shape: &Shape) -> (usize, usize) {
        let channels = shape.dims()[1];
        let pixels = shape.dims()[2..].iter().product();
        (channels / self.groups, pixels)
    }

    fn backward<T: Real>(&self, [x, w, b]: [&Tensor; 3], grad: &Tensor) -> Result<Grads3> {
        let (per_group, pixels) = self.sizes(x.shape());
        let channels = per_group * self.groups;
        let (xv, wv, bv, gv) = (View::of(x), View::of(w), View::of(b), View::of(grad));
        let (xs, ws, bs, gs) = (
            xv.slice::<T>()?,
            wv.slice::<T>()?,
            bv.slice::<T>()?,
            gv.slice::<T>()?,
        );
        let group = per_group * pixels;
        let mut gx = vec![T::zero(); xs.len()];
        // Each image's share of the gradients of weight and bias, [B, C].
        let mut gw = vec![T::zero(); xs.len() / pixels];
        let mut gb = gw.clone();
        gx.par_chunks_exact_mut(group)
            .zip(
                gw.par_chunks_exact_mut(per_group)
                    .zip(gb.par_chunks_exact_mut(per_group)),
            )
            .enumerate()
            .for_each(|(index, (gx, (gw, gb)))| {
                let first = index % self.groups * per_group;
                let (x, g) = (&xs[index * group..][..group], &gs[index * group..][..group]);
                let (ws, bs) = (&ws[first..][..per_group], &bs[first..][..per_group]);
                vectorised(|| {
                    let (mean, rstd) = statistics(x, self.eps);
                    let (mut sum_g, mut sum_gx) = (0.0, 0.0); // of the gradient at x̂, and of it times x̂
                    for c in 0..per_group {
                        let (w, b) = (ws[c], bs[c]);
                        let span = c * pixels..(c + 1) * pixels;
                        let (x, g, gx) = (&x[span.clone()], &g[span.clone()], &mut gx[span]);
                        // gx holds the gradient before the activation until the second pass.
                        if self.silu {
                            for ((d, &x), &g) in gx.iter_mut().zip(x).zip(g) {
                                let y = (x - mean) * rstd * w + b;
                                let s = sigmoid(y);
                                *d = g * s * (T::one() + y * (T::one() - s));
                            }
                        } else {
                            gx.copy_from_slice(g);
                        }
                        let total = sum1(gx, |g| g);
                        let against = sum2(gx, x, |g, x| g * (x - mean) * rstd);
                        gw[c] = real(against);
                        gb[c] = real(total);
                        sum_g += total * w.to_f64();
                        sum_gx += against * w.to_f64();
                    }
                    let n = group as f64;
                    let (mean_g, mean_gx): (T, T) = (real(sum_g / n), real(sum_gx / n));
                    for (c, &w) in ws.iter().enumerate() {
                        let span = c * pixels..(c + 1) * pixels;
                        for (d, &x) in gx[span.clone()].iter_mut().zip(&x[span]) {
                            *d = rstd * (*d * w - mean_g - (x - mean) * rstd * mean_gx);
                        }
                    }
                });
            });
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(gx, x.dims(), device)?),
            Some(Tensor::from_vec(sum_rows(&gw, channels), channels, device)?),
            Some(Tensor::from_vec(sum_rows(&gb, channels), channels, device)?),
        ))
    }
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(op: &GroupNorm, s: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
            let (per_group, pixels) = op.sizes(s[0].1.shape());
            let [x, w, b] = s.map(|(s, l)| slice::<T>(s, l));
            let (x, w, b) = (x?, w?, b?);
            let group = per_group * pixels;
            let mut out = vec![T::zero(); x.len()];
            out.par_chunks_exact_mut(group)
                .zip(x.par_chunks_exact(group))
                .enumerate()
                .for_each(|(index, (out, x))| {
                    let first = index % op.groups * per_group;
                    vectorised(|| {
                        let (mean, rstd) = statistics(x, op.eps);
                        let planes = out.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels));
                        for (c, (out, x)) in planes.enumerate() {
                            let scale = rstd * w[first + c];
                            let shift = b[first + c] - mean * scale;
                            if op.silu {
                                for (o, &x) in out.iter_mut().zip(x) {
                                    let y = x * scale + shift;
                                    *o = y * sigmoid(y);
                                }
                            } else {
                                for (o, &x) in out.iter_mut().zip(x) {
                                    *o = x * scale + shift;
                                }
                            }
                        }
                    });
                });
            Ok(T::to_cpu_storage_owned(out))
        }
        let operands = [(x, xl), (w, wl), (b, bl)];
        let out = by_dtype!(x.dtype(), self.name(), run(self, operands))?;
        Ok((out, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<Grads3> {
        fn run<T: Real>(op: &GroupNorm, args: [&Tensor; 3], grad: &Tensor) -> Result<Grads3> {
            op.backward::<T>(args, grad)
        }
        by_dtype!(
            x.dtype(),
            self.name(),
            run(self, [x, w, b], &grad.contiguous()?)
        )
    }
}

/// Rows normalised by one task, and summed into one partial gradient.
const ROWS: usize = 64;

struct LayerNorm {
    eps: f64,
}

impl LayerNorm {
    fn backward<T: Real>(&self, [x, w]: [&Tensor; 2], grad: &Tensor) -> Result<Grads3> {
        let c = w.dim(0)?;
        let (xv, wv, gv) = (View::of(x), View::of(w), View::of(grad));
        let (xs, ws, gs) = (xv.slice::<T>()?, wv.slice::<T>()?, gv.slice::<T>()?);
        let parts = xs.len().div_ceil(ROWS * c);
        let mut gx = vec![T::zero(); xs.len()];
        let (mut gw, mut gb) = (vec![T::zero(); parts * c], vec![T::zero(); parts * c]);
        gx.par_chunks_mut(ROWS * c)
            .zip(xs.par_chunks(ROWS * c).zip(gs.par_chunks(ROWS * c)))
            .zip(gw.par_chunks_exact_mut(c).zip(gb.par_chunks_exact_mut(c)))
            .for_each(|((gx, (x, g)), (gw, gb))| {
                vectorised(|| {
                    let rows = gx
                        .chunks_exact_mut(c)
                        .zip(x.chunks_exact(c))
                        .zip(g.chunks_exact(c));
                    for ((gx, x), g) in rows {
                        let (mean, rstd) = statistics(x, self.eps);
                        for i in 0..c {
                            let xhat = (x[i] - mean) * rstd;
                            gw[i] += g[i] * xhat;
                            gb[i] += g[i];
                            gx[i] = g[i] * ws[i];
                        }
                        let mean_g: T = real(sum1(gx, |g| g) / c as f64);
                        let mean_gx: T = real(sum2(gx, x, |g, x| g * (x - mean) * rstd) / c as f64);
                        for (d, &x) in gx.iter_mut().zip(x) {
                            *d = rstd * (*d - mean_g - (x - mean) * rstd * mean_gx);
                        }
                    }
                });
            });
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(gx, x.dims(), device)?),
            Some(Tensor::from_vec(sum_rows(&gw, c), c, device)?),
            Some(Tensor::from_vec(sum_rows(&gb, c), c, device)?),
        ))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(eps: f64, s: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
            let [x, w, b] = s.map(|(s, l)| slice::<T>(s, l));
            let (x, w, b) = (x?, w?, b?);
            let c = w.len();
            let mut out = vec![T::zero(); x.len()];
            out.par_chunks_mut(ROWS * c)
                .zip(x.par_chunks(ROWS * c))
                .for_each(|(out, x)| {
                    vectorised(|| {
                        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                            let (mean, rstd) = statistics(x, eps);
                            for i in 0..c {
                                out[i] = (x[i] - mean) * rstd * w[i] + b[i];
                            }
                        }
                    });
                });
            Ok(T::to_cpu_storage_owned(out))
        }
        let operands = [(x, xl), (w, wl), (b, bl)];
        let out = by_dtype!(x.dtype(), self.name(), run(self.eps, operands))?;
        Ok((out, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<Grads3> {
        fn run<T: Real>(op: &LayerNorm, args: [&Tensor; 2], grad: &Tensor) -> Result<Grads3> {
            op.backward::<T>(args, grad)
        }
        by_dtype!(
            x.dtype(),
            self.name(),
            run(self, [x, w], &grad.contiguous()?)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{check_gradients, random};
    use super::*;

    #[test]
    fn group_norm_gradients_match_finite_differences() -> Result<()> {
        for (shape, groups) in [(&[2, 6, 3, 4][..], 3), (&[3, 4, 5][..], 1)] {
            let c = shape[1];
            for silu in [false, true] {
                let inputs = [random(shape, 1)?, random(&[c], 2)?, random(&[c], 3)?];
                check_gradients(&inputs, |t| {
                    group_norm(&t[0], &t[1], &t[2], groups, 1e-5, silu)
                })?;
            }
        }
        Ok(())
    }

    #[test]
    fn layer_norm_gradients_match_finite_differences() -> Result<()> {
        let inputs = [random(&[2, 67, 5], 1)?, random(&[5], 2)?, random(&[5], 3)?];
        check_gradients(&inputs, |t| layer_norm(&t[0], &t[1], &t[2], 1e-5))
    }
}
