//! [`ops::group_norm`](crate::ops::group_norm()) and [`ops::layer_norm`](crate::ops::layer_norm()) on the CPU.

use candle_core::{D, Result, Shape, Tensor};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::kernel::{Kernel, apply};
use super::real::{Real, real, sigmoid};
use super::reduce::{sum_rows, sum1, sum2};

/// As [`crate::ops::group_norm()`], which checks the shapes.
pub(in crate::ops) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let kernel = GroupNormKernel {
        groups,
        per_group: x.dim(1)? / groups,
        pixels: x.dims()[2..].iter().product(),
        eps,
        silu,
        shape: x.shape().clone(),
    };
    apply(kernel, [x, weight, bias])
}

/// As [`crate::ops::layer_norm()`], which checks the shapes.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let kernel = LayerNormKernel {
        width: x.dim(D::Minus1)?,
        eps,
        shape: x.shape().clone(),
    };
    apply(kernel, [x, weight, bias])
}

/// Mean and reciprocal standard deviation (biased) of a slice.
#[inline(always)]
fn statistics<T: Real>(x: &[T], eps: f64) -> (T, T) {
    let n = x.len() as f64;
    let mean: T = real(sum1(x, |x| x) / n);
    let variance = sum1(x, |x| (x - mean) * (x - mean)) / n;
    (mean, real(1.0 / (variance + eps).sqrt()))
}

struct GroupNormKernel {
    groups: usize,
    /// Channels of a group.
    per_group: usize,
    /// Pixels of a channel.
    pixels: usize,
    eps: f64,
    silu: bool,
    shape: Shape,
}

impl GroupNormKernel {
    /// Elements of one group of one image.
    fn group(&self) -> usize {
        self.per_group * self.pixels
    }

    /// The weights or biases of the channels of the `index`th group, counted over images.
    fn channels<'a, T>(&self, index: usize, all: &'a [T]) -> &'a [T] {
        &all[index % self.groups * self.per_group..][..self.per_group]
    }
}

impl Kernel<3> for GroupNormKernel {
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
        let [gw, gb] = [gw, gb].map(|parts| sum_rows(&parts, channels, 1));
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
    // Sums of the gradient of x̂, and of that gradient times x̂.
    let (mut sum_g, mut sum_gx) = (0.0, 0.0);
    for (c, (&w, &b)) in weight.iter().zip(bias).enumerate() {
        let span = c * pixels..(c + 1) * pixels;
        let (x, g, gx) = (&x[span.clone()], &grad[span.clone()], &mut gx[span]);
        // gx holds the gradient before the activation until the second pass.
        if silu {
            silu_backward(gx, x, g, rstd * w, b - mean * rstd * w);
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

/// Rows that one task normalises, and rows of a partial sum of the parameters' gradients.
const ROWS: usize = 64;

struct LayerNormKernel {
    width: usize,
    eps: f64,
    shape: Shape,
}

impl Kernel<3> for LayerNormKernel {
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
        let [gw, gb] = [gw, gb].map(|parts| sum_rows(&parts, c, 1));
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

/// Normalises one row. A function of its own, so that the compiler knows the slices not to overlap; so is [`add_row`].
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

/// The gradients of some rows, and the sums over these rows of the gradients of weight and bias.
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
