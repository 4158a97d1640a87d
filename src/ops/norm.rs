//! Group and layer normalisation.

use candle_core::{D, Result, Shape, Tensor};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::cpu::{Real, real, sigmoid, sum1, sum2};
use super::kernel::{Kernel, apply3, has_kernel};

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
        let kernel = GroupNorm {
            groups,
            per_group: c / groups,
            pixels: x.dims()[2..].iter().product(),
            eps,
            silu,
            shape: x.shape().clone(),
        };
        return apply3(kernel, [x, weight, bias]);
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
        let kernel = LayerNorm {
            width: c,
            eps,
            shape: x.shape().clone(),
        };
        return apply3(kernel, [x, weight, bias]);
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
    /// Channels of a group.
    per_group: usize,
    /// Pixels of a channel.
    pixels: usize,
    eps: f64,
    silu: bool,
    shape: Shape,
}

impl GroupNorm {
    /// Elements of one group of one image.
    fn group(&self) -> usize {
        self.per_group * self.pixels
    }

    /// The channels of the `index`th group, counted over images.
    fn channels<'a, T>(&self, index: usize, all: &'a [T]) -> &'a [T] {
        &all[index % self.groups * self.per_group..][..self.per_group]
    }
}

impl Kernel<3> for GroupNorm {
    const NAME: &'static str = "group_norm";

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward<T: Real>(&self, [x, w, b]: [&[T]; 3]) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        out.par_chunks_exact_mut(self.group())
            .zip(x.par_chunks_exact(self.group()))
            .enumerate()
            .for_each(|(index, (out, x))| {
                let (w, b) = (self.channels(index, w), self.channels(index, b));
                normalise_group(out, x, w, b, self.eps, self.silu);
            });
        out
    }

    fn backward<T: Real>(
        &self,
        [x, w, b]: [&[T]; 3],
        grad: &[T],
        _: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let mut gx = vec![T::zero(); x.len()];
        // Each image's share of the gradients of weight and bias, [B, C].
        let mut gw = vec![T::zero(); x.len() / self.pixels];
        let mut gb = gw.clone();
        gx.par_chunks_exact_mut(self.group())
            .zip(gw.par_chunks_exact_mut(self.per_group))
            .zip(gb.par_chunks_exact_mut(self.per_group))
            .zip(x.par_chunks_exact(self.group()))
            .zip(grad.par_chunks_exact(self.group()))
            .enumerate()
            .for_each(|(index, ((((gx, gw), gb), x), grad))| {
                let (w, b) = (self.channels(index, w), self.channels(index, b));
                group_backward([gx, gw, gb], [x, w, b, grad], self.eps, self.silu);
            });
        let channels = self.groups * self.per_group;
        let [gw, gb] = [gw, gb].map(|parts| sum_rows(&parts, channels));
        [Some(gx), Some(gw), Some(gb)]
    }
}

/// Normalises one group `[channels, pixels]` of one image.
#[pulp::with_simd(normalise_group = Arch::new())]
#[inline(always)]
fn normalise_group_on<S: Simd, T: Real>(
    _: S,
    out: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    eps: f64,
    silu: bool,
) {
    let pixels = x.len() / weight.len();
    let (mean, rstd) = statistics(x, eps);
    let planes = out.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels));
    for ((out, x), (&w, &b)) in planes.zip(weight.iter().zip(bias)) {
        let scale = rstd * w;
        let shift = b - mean * scale;
        if silu {
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
}

/// The gradients of one group of one image: of its input and of its channels' weights and biases.
#[pulp::with_simd(group_backward = Arch::new())]
#[inline(always)]
fn group_backward_on<S: Simd, T: Real>(
    _: S,
    [gx, gw, gb]: [&mut [T]; 3],
    [x, weight, bias, grad]: [&[T]; 4],
    eps: f64,
    silu: bool,
) {
    let pixels = x.len() / weight.len();
    let (mean, rstd) = statistics(x, eps);
    let (mut sum_g, mut sum_gx) = (0.0, 0.0); // of the gradient at x̂, and of it times x̂
    for (c, (&w, &b)) in weight.iter().zip(bias).enumerate() {
        let span = c * pixels..(c + 1) * pixels;
        let (x, g, gx) = (&x[span.clone()], &grad[span.clone()], &mut gx[span]);
        // gx holds the gradient before the activation until the second pass.
        match silu {
            true => silu_backward(gx, x, g, rstd * w, b - mean * rstd * w),
            false => gx.copy_from_slice(g),
        }
        let total = sum1(gx, |g| g);
        let against = sum2(gx, x, |g, x| g * (x - mean) * rstd);
        gw[c] = real(against);
        gb[c] = real(total);
        sum_g += total * w.to_f64();
        sum_gx += against * w.to_f64();
    }
    let n = x.len() as f64;
    let (mean_g, mean_gx): (T, T) = (real(sum_g / n), real(sum_gx / n));
    let planes = gx.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels));
    for ((gx, x), &w) in planes.zip(weight) {
        for (d, &x) in gx.iter_mut().zip(x) {
            *d = rstd * (*d * w - mean_g - (x - mean) * rstd * mean_gx);
        }
    }
}

/// The gradient before the SiLU of `scale·x + shift`.
#[inline(always)]
fn silu_backward<T: Real>(out: &mut [T], x: &[T], grad: &[T], scale: T, shift: T) {
    for ((d, &x), &g) in out.iter_mut().zip(x).zip(grad) {
        let y = x * scale + shift;
        let s = sigmoid(y);
        *d = g * s * (T::one() + y * (T::one() - s));
    }
}

/// Rows normalised by one task, and summed into one partial gradient.
const ROWS: usize = 64;

struct LayerNorm {
    width: usize,
    eps: f64,
    shape: Shape,
}

impl Kernel<3> for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward<T: Real>(&self, [x, w, b]: [&[T]; 3]) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        out.par_chunks_mut(ROWS * self.width)
            .zip(x.par_chunks(ROWS * self.width))
            .for_each(|(out, x)| normalise_rows(out, x, w, b, self.eps));
        out
    }

    fn backward<T: Real>(
        &self,
        [x, w, _]: [&[T]; 3],
        grad: &[T],
        _: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let (c, rows) = (self.width, ROWS * self.width);
        let parts = x.len().div_ceil(rows);
        let mut gx = vec![T::zero(); x.len()];
        let (mut gw, mut gb) = (vec![T::zero(); parts * c], vec![T::zero(); parts * c]);
        gx.par_chunks_mut(rows)
            .zip(gw.par_chunks_exact_mut(c))
            .zip(gb.par_chunks_exact_mut(c))
            .zip(x.par_chunks(rows))
            .zip(grad.par_chunks(rows))
            .for_each(|((((gx, gw), gb), x), grad)| {
                rows_backward([gx, gw, gb], [x, w], grad, self.eps);
            });
        let [gw, gb] = [gw, gb].map(|parts| sum_rows(&parts, c));
        [Some(gx), Some(gw), Some(gb)]
    }
}

#[pulp::with_simd(normalise_rows = Arch::new())]
#[inline(always)]
fn normalise_rows_on<S: Simd, T: Real>(
    _: S,
    out: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    eps: f64,
) {
    let c = weight.len();
    for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
        let (mean, rstd) = statistics(x, eps);
        scale_and_shift(out, x, weight, bias, mean, rstd);
    }
}

/// One row, normalised. A function of its own, so that the compiler knows the slices apart; so are those below.
#[inline(always)]
fn scale_and_shift<T: Real>(out: &mut [T], x: &[T], weight: &[T], bias: &[T], mean: T, rstd: T) {
    let n = out.len();
    let (x, weight, bias) = (&x[..n], &weight[..n], &bias[..n]);
    for i in 0..n {
        out[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
    }
}

/// Adds one row to the gradients of weight and bias, and puts the gradient of the normalised row into `gx`.
#[inline(always)]
fn add_row<T: Real>(
    gx: &mut [T],
    gw: &mut [T],
    gb: &mut [T],
    x: &[T],
    grad: &[T],
    weight: &[T],
    (mean, rstd): (T, T),
) {
    let n = gx.len();
    let (gw, gb, x, grad, weight) = (
        &mut gw[..n],
        &mut gb[..n],
        &x[..n],
        &grad[..n],
        &weight[..n],
    );
    for i in 0..n {
        gw[i] += grad[i] * ((x[i] - mean) * rstd);
        gb[i] += grad[i];
        gx[i] = grad[i] * weight[i];
    }
}

/// The gradients of some rows: of the rows themselves, and added up over them those of weight and bias.
#[pulp::with_simd(rows_backward = Arch::new())]
#[inline(always)]
fn rows_backward_on<S: Simd, T: Real>(
    _: S,
    [gx, gw, gb]: [&mut [T]; 3],
    [x, weight]: [&[T]; 2],
    grad: &[T],
    eps: f64,
) {
    let c = weight.len();
    let rows = gx.chunks_exact_mut(c).zip(x.chunks_exact(c));
    for ((gx, x), g) in rows.zip(grad.chunks_exact(c)) {
        let (mean, rstd) = statistics(x, eps);
        add_row(gx, gw, gb, x, g, weight, (mean, rstd));
        let mean_g: T = real(sum1(gx, |g| g) / c as f64);
        let mean_gx: T = real(sum2(gx, x, |g, x| g * (x - mean) * rstd) / c as f64);
        for (d, &x) in gx.iter_mut().zip(x) {
            *d = rstd * (*d - mean_g - (x - mean) * rstd * mean_gx);
        }
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
