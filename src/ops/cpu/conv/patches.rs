//! Convolution as matrix products over unrolled patches (im2col), for any kernel and stride.
//!
//! A stride-1 input gradient is itself a convolution of the output gradient with flipped kernels; a weight gradient is a product
//! of the output gradient with the patches of the input. Both run at the forward's speed. Patches are unrolled a few output
//! rows at a time, so that they stay in cache and memory stays small at full resolution.

use rayon::prelude::*;

use super::super::gemm::{Mat, MatMut, Threads, gemm};
use super::super::real::Real;
use super::Geometry;

/// Bytes of unrolled patches at a time: about half of a core's second-level cache when each core has an image of its own, more
/// when all cores share one. The limit depends on the batch and not on the number of threads, on which no sum may depend.
fn patch_bytes(batch: usize) -> usize {
    if batch < 4 { 16 << 20 } else { 1 << 20 }
}

/// Bytes of unrolled patches at a time for a weight's gradient.
const WEIGHT_PATCH_BYTES: usize = 4 << 20;

impl Geometry {
    /// Length of one patch: the input values of one output pixel.
    fn patch(&self) -> usize {
        self.c * self.kh * self.kw
    }

    /// Whether the patches are the image itself.
    fn is_pointwise(&self) -> bool {
        self.kh == 1 && self.kw == 1 && self.stride == 1 && self.pad_h == 0 && self.pad_w == 0
    }

    /// Output rows whose patches (of `channels` input channels) fit in `bytes`.
    fn rows_within<T>(&self, channels: usize, bytes: usize) -> usize {
        let row = channels * self.kh * self.kw * self.out_w() * size_of::<T>();
        (bytes / row.max(1)).clamp(1, self.out_h())
    }
}

/// Unrolls output rows `rows` of one channel: `out` is `[kh·kw, rows·out_w]`, with lines that are `stride` apart.
fn unroll_channel<T: Real>(
    x: &[T],
    g: &Geometry,
    rows: std::ops::Range<usize>,
    out: &mut [T],
    stride: usize,
) {
    let ow = g.out_w();
    let width = rows.len() * ow;
    for ky in 0..g.kh {
        for kx in 0..g.kw {
            let line = &mut out[(ky * g.kw + kx) * stride..][..width];
            for (line, oy) in line.chunks_exact_mut(ow).zip(rows.clone()) {
                let Some(y) = (oy * g.stride + ky)
                    .checked_sub(g.pad_h)
                    .filter(|&y| y < g.h)
                else {
                    line.fill(T::zero());
                    continue;
                };
                let row = &x[y * g.w..][..g.w];
                if g.stride == 1 {
                    // Output columns whose input column ox + kx - pad_w lies inside the image.
                    let from = g.pad_w.saturating_sub(kx).min(ow);
                    let to = (g.w + g.pad_w).saturating_sub(kx).clamp(from, ow);
                    line[..from].fill(T::zero());
                    if from < to {
                        let start = from + kx - g.pad_w;
                        line[from..to].copy_from_slice(&row[start..start + to - from]);
                    }
                    line[to..].fill(T::zero());
                } else {
                    for (ox, v) in line.iter_mut().enumerate() {
                        let x = (ox * g.stride + kx)
                            .checked_sub(g.pad_w)
                            .and_then(|x| row.get(x));
                        *v = x.copied().unwrap_or_default();
                    }
                }
            }
        }
    }
}

/// Adds the patches of output rows `rows` of one channel back to where [`unroll_channel`] read them.
fn roll_channel<T: Real>(patches: &[T], g: &Geometry, rows: std::ops::Range<usize>, x: &mut [T]) {
    let ow = g.out_w();
    let width = rows.len() * ow;
    for ky in 0..g.kh {
        for kx in 0..g.kw {
            let line = &patches[(ky * g.kw + kx) * width..][..width];
            for (line, oy) in line.chunks_exact(ow).zip(rows.clone()) {
                let Some(y) = (oy * g.stride + ky)
                    .checked_sub(g.pad_h)
                    .filter(|&y| y < g.h)
                else {
                    continue;
                };
                let row = &mut x[y * g.w..][..g.w];
                for (ox, &v) in line.iter().enumerate() {
                    let x = (ox * g.stride + kx).checked_sub(g.pad_w);
                    if let Some(x) = x.and_then(|x| row.get_mut(x)) {
                        *x += v;
                    }
                }
            }
        }
    }
}

/// One image's convolution: weight `[O, patch]` · patches onto `out` `[O, pixels]`, which holds the bias.
fn forward_image<T: Real>(
    x: &[T],
    weight: &[T],
    out: &mut [T],
    g: &Geometry,
    bytes: usize,
    threads: Threads,
) {
    let (pixels, patch, ow) = (g.out_pixels(), g.patch(), g.out_w());
    let weight = Mat::new(weight, g.o, patch, patch);
    if g.is_pointwise() {
        let x = Mat::new(x, patch, pixels, pixels);
        gemm(
            MatMut::new(out, g.o, pixels, pixels),
            true,
            T::one(),
            weight,
            x,
            threads,
        );
        return;
    }
    let step = g.rows_within::<T>(g.c, bytes);
    T::with_scratch(patch * step * ow, |buffer| {
        for from in (0..g.out_h()).step_by(step) {
            let rows = from..(from + step).min(g.out_h());
            let width = rows.len() * ow;
            let buffer = &mut buffer[..patch * width];
            let taps = g.kh * g.kw * width;
            let unroll =
                |(patches, x): (&mut [T], &[T])| unroll_channel(x, g, rows.clone(), patches, width);
            match threads {
                Threads::One => buffer
                    .chunks_exact_mut(taps)
                    .zip(x.chunks_exact(g.h * g.w))
                    .for_each(unroll),
                Threads::Pool => buffer
                    .par_chunks_exact_mut(taps)
                    .zip(x.par_chunks_exact(g.h * g.w))
                    .for_each(unroll),
            }
            let dst = &mut out[from * ow..];
            let patches = Mat::new(buffer, patch, width, width);
            gemm(
                MatMut::new(dst, g.o, width, pixels),
                true,
                T::one(),
                weight,
                patches,
                threads,
            );
        }
    });
}

/// A batch's convolution: images in parallel if there are enough images, else each image by all threads. `bias`: `[O]` or
/// `[B, O]`.
pub(super) fn forward<T: Real>(
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    batch: usize,
    g: &Geometry,
) -> Vec<T> {
    let (image, result) = (g.c * g.h * g.w, g.o * g.out_pixels());
    let bytes = patch_bytes(batch);
    let mut out = vec![T::zero(); batch * result];
    if let Some(bias) = bias {
        out.par_chunks_exact_mut(g.out_pixels())
            .enumerate()
            .for_each(|(plane, out)| out.fill(bias[plane % bias.len()]));
    }
    if batch >= rayon::current_num_threads() {
        out.par_chunks_exact_mut(result)
            .zip(x.par_chunks_exact(image))
            .for_each(|(out, x)| forward_image(x, weight, out, g, bytes, Threads::One));
    } else {
        for (out, x) in out.chunks_exact_mut(result).zip(x.chunks_exact(image)) {
            forward_image(x, weight, out, g, bytes, Threads::Pool);
        }
    }
    out
}

/// Whether the input's gradient is faster as a convolution than from patches, by the numbers that pass through memory: turned
/// kernels and unrolled output gradients against patch gradients, which are added up again.
pub(super) fn convolving_pays(batch: usize, g: &Geometry) -> bool {
    let (taps, pixels) = (g.kh * g.kw, batch * g.out_pixels());
    let possible = g.stride == 1 && g.pad_h < g.kh && g.pad_w < g.kw;
    possible && 2 * g.o * g.patch() + g.o * taps * pixels < 2 * g.patch() * pixels
}

/// The input's gradient at stride 1: the output gradient convolved with the kernels turned by 180 degrees.
pub(super) fn input_grad_by_convolution<T: Real>(
    grad: &[T],
    weight: &[T],
    batch: usize,
    g: &Geometry,
) -> Vec<T> {
    let taps = g.kh * g.kw;
    let mut turned = vec![T::zero(); weight.len()];
    for (o, kernels) in weight.chunks_exact(g.c * taps).enumerate() {
        for (c, kernel) in kernels.chunks_exact(taps).enumerate() {
            let dst = &mut turned[(c * g.o + o) * taps..][..taps];
            for (d, &k) in dst.iter_mut().zip(kernel.iter().rev()) {
                *d = k;
            }
        }
    }
    forward(grad, &turned, None, batch, &g.turned())
}

/// The input's gradient at any stride: patch gradients (weightᵀ · output gradient) added back into the image.
pub(super) fn input_grad_by_patches<T: Real>(
    grad: &[T],
    weight: &[T],
    batch: usize,
    g: &Geometry,
) -> Vec<T> {
    let (patch, pixels, ow) = (g.patch(), g.out_pixels(), g.out_w());
    let weight = Mat::new(weight, g.o, patch, patch).t();
    let one_image = |(x, grad): (&mut [T], &[T]), threads: Threads| {
        let step = g.rows_within::<T>(g.c, patch_bytes(batch));
        T::with_scratch(patch * step * ow, |buffer| {
            for from in (0..g.out_h()).step_by(step) {
                let rows = from..(from + step).min(g.out_h());
                let width = rows.len() * ow;
                let buffer = &mut buffer[..patch * width];
                let grad = Mat::new(&grad[from * ow..], g.o, width, pixels);
                gemm(
                    MatMut::new(buffer, patch, width, width),
                    false,
                    T::one(),
                    weight,
                    grad,
                    threads,
                );
                let taps = g.kh * g.kw * width;
                let roll =
                    |(x, patches): (&mut [T], &[T])| roll_channel(patches, g, rows.clone(), x);
                match threads {
                    Threads::One => x
                        .chunks_exact_mut(g.h * g.w)
                        .zip(buffer.chunks_exact(taps))
                        .for_each(roll),
                    Threads::Pool => x
                        .par_chunks_exact_mut(g.h * g.w)
                        .zip(buffer.par_chunks_exact(taps))
                        .for_each(roll),
                }
            }
        });
    };
    let image = g.c * g.h * g.w;
    let mut out = vec![T::zero(); batch * image];
    if batch >= rayon::current_num_threads() {
        out.par_chunks_exact_mut(image)
            .zip(grad.par_chunks_exact(g.o * pixels))
            .for_each(|pair| one_image(pair, Threads::One));
    } else {
        out.chunks_exact_mut(image)
            .zip(grad.chunks_exact(g.o * pixels))
            .for_each(|pair| one_image(pair, Threads::Pool));
    }
    out
}

/// The weight's gradient `[O, patch]`, summed over chunks in order: of several images side by side, or of some rows of one.
pub(super) fn weight_grad<T: Real>(x: &[T], grad: &[T], batch: usize, g: &Geometry) -> Vec<T> {
    let (patch, pixels, ow) = (g.patch(), g.out_pixels(), g.out_w());
    let image = g.c * g.h * g.w;
    let step = g.rows_within::<T>(g.c, WEIGHT_PATCH_BYTES);
    let images = if step == g.out_h() {
        (WEIGHT_PATCH_BYTES / (patch * pixels * size_of::<T>()).max(1)).clamp(1, batch)
    } else {
        1
    };
    let widest = images * step * ow;
    let mut out = vec![T::zero(); patch * g.o];
    T::with_scratch((patch + g.o) * widest, |buffer| {
        let (patches, grads) = buffer.split_at_mut(patch * widest);
        let chunks = x
            .chunks(images * image)
            .zip(grad.chunks(images * g.o * pixels));
        for (index, (x, grad)) in chunks.enumerate() {
            let count = x.len() / image;
            for from in (0..g.out_h()).step_by(step) {
                let rows = from..(from + step).min(g.out_h());
                let width = rows.len() * ow;
                let all = count * width;
                let patches = if g.is_pointwise() && count == 1 {
                    Mat::new(&x[from * ow..], patch, width, pixels)
                } else {
                    let patches = &mut patches[..patch * all];
                    unroll_side_by_side(x, g, rows, patches, count);
                    Mat::new(&*patches, patch, all, all)
                };
                let grad = match count {
                    1 => Mat::new(&grad[from * ow..], g.o, width, pixels),
                    _ => {
                        let grads = &mut grads[..g.o * all];
                        lay_side_by_side(grad, grads, count, pixels);
                        Mat::new(&*grads, g.o, all, all)
                    }
                };
                let dst = MatMut::new(&mut out, g.o, patch, patch);
                let more = index > 0 || from > 0;
                gemm(dst, more, T::one(), grad, patches.t(), Threads::Pool);
            }
        }
    });
    out
}

/// Unrolls output rows `rows` of `count` images into `[patch, count·rows·out_w]`.
fn unroll_side_by_side<T: Real>(
    x: &[T],
    g: &Geometry,
    rows: std::ops::Range<usize>,
    patches: &mut [T],
    count: usize,
) {
    let (plane, width) = (g.h * g.w, rows.len() * g.out_w());
    patches
        .par_chunks_exact_mut(g.kh * g.kw * count * width)
        .enumerate()
        .for_each(|(c, patches)| {
            for (i, x) in x.chunks_exact(g.c * plane).enumerate() {
                let x = &x[c * plane..][..plane];
                unroll_channel(x, g, rows.clone(), &mut patches[i * width..], count * width);
            }
        });
}

/// From `[count, O, pixels]` to `[O, count·pixels]`.
fn lay_side_by_side<T: Real>(grad: &[T], out: &mut [T], count: usize, pixels: usize) {
    let image = grad.len() / count;
    out.par_chunks_exact_mut(count * pixels)
        .enumerate()
        .for_each(|(o, out)| {
            for (out, grad) in out.chunks_exact_mut(pixels).zip(grad.chunks_exact(image)) {
                out.copy_from_slice(&grad[o * pixels..][..pixels]);
            }
        });
}
