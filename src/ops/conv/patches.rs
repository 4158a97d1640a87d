//! Convolution as matrix products over unrolled patches, for any kernel and stride.
//!
//! A stride-1 input gradient is itself a convolution of the output gradient with flipped kernels; a weight gradient is a product
//! of the output gradient with the patches of the input. Both run at the forward's speed. Patches are unrolled a few output
//! rows at a time, so that they stay in cache and memory stays small at full resolution.

use rayon::prelude::*;

use super::super::cpu::Real;
use super::super::gemm::{Mat, MatMut, Threads, gemm};
use super::Geometry;

/// Bytes of unrolled patches at a time: about half of a core's second-level cache when each core has an image of its own, more
/// when all cores work on one. It goes by the batch and not by the number of threads, on which no sum may depend.
fn patch_bytes(batch: usize) -> usize {
    if batch < 4 {
        16 << 20
    } else {
        WEIGHT_PATCH_BYTES
    }
}

/// The same for a weight gradient's tasks.
const WEIGHT_PATCH_BYTES: usize = 1 << 20;
/// Input channels whose weight gradient one task computes.
const CHANNEL_BLOCK: usize = 16;

impl Geometry {
    /// Length of one patch: what one output pixel sees.
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

/// Unrolls output rows `rows` of one channel: `out` is `[kh·kw, rows·out_w]`.
fn unroll_channel<T: Real>(x: &[T], g: &Geometry, rows: std::ops::Range<usize>, out: &mut [T]) {
    let ow = g.out_w();
    let width = rows.len() * ow;
    for ky in 0..g.kh {
        for kx in 0..g.kw {
            let line = &mut out[(ky * g.kw + kx) * width..][..width];
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

/// One image's convolution: `out` `[O, pixels]` = bias + weight `[O, patch]` · patches.
fn forward_image<T: Real>(
    x: &[T],
    (weight, bias): (&[T], Option<&[T]>),
    out: &mut [T],
    g: &Geometry,
    bytes: usize,
    threads: Threads,
) {
    let (pixels, patch, ow) = (g.out_pixels(), g.patch(), g.out_w());
    if let Some(bias) = bias {
        for (row, &b) in out.chunks_exact_mut(pixels).zip(bias) {
            row.fill(b);
        }
    }
    let weight = Mat::new(weight, g.o, patch, patch);
    if g.is_pointwise() {
        let x = Mat::new(x, patch, pixels, pixels);
        gemm(
            MatMut::new(out, g.o, pixels, pixels),
            bias.is_some(),
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
                |(patches, x): (&mut [T], &[T])| unroll_channel(x, g, rows.clone(), patches);
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
                bias.is_some(),
                T::one(),
                weight,
                patches,
                threads,
            );
        }
    });
}

/// A batch's convolution: images in parallel when there are enough of them, else each image by all threads.
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
    if batch >= rayon::current_num_threads() {
        out.par_chunks_exact_mut(result)
            .zip(x.par_chunks_exact(image))
            .for_each(|(out, x)| forward_image(x, (weight, bias), out, g, bytes, Threads::One));
    } else {
        for (out, x) in out.chunks_exact_mut(result).zip(x.chunks_exact(image)) {
            forward_image(x, (weight, bias), out, g, bytes, Threads::Pool);
        }
    }
    out
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

/// The input's gradient in general: patch gradients (weightᵀ · output gradient) added back into the image.
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

/// The weight's gradient `[O, patch]`: a task for each block of input channels, which sums over images in order.
pub(super) fn weight_grad<T: Real>(x: &[T], grad: &[T], batch: usize, g: &Geometry) -> Vec<T> {
    let (patch, pixels, ow, taps) = (g.patch(), g.out_pixels(), g.out_w(), g.kh * g.kw);
    let block = CHANNEL_BLOCK * if taps == 1 { 4 } else { 1 };
    let step = g.rows_within::<T>(block.min(g.c), WEIGHT_PATCH_BYTES);
    let mut transposed = vec![T::zero(); patch * g.o]; // [patch, O], so that a block of channels is contiguous
    transposed
        .par_chunks_mut(block * taps * g.o)
        .enumerate()
        .for_each(|(index, out)| {
            let channels = out.len() / (taps * g.o);
            let first = index * block;
            T::with_scratch(channels * taps * step * ow, |buffer| {
                for b in 0..batch {
                    let x = &x[(b * g.c + first) * g.h * g.w..][..channels * g.h * g.w];
                    for from in (0..g.out_h()).step_by(step) {
                        let rows = from..(from + step).min(g.out_h());
                        let width = rows.len() * ow;
                        let grad =
                            Mat::new(&grad[b * g.o * pixels + from * ow..], g.o, width, pixels);
                        let patches = if g.is_pointwise() {
                            Mat::new(&x[from * ow..], channels, width, pixels)
                        } else {
                            let buffer = &mut buffer[..channels * taps * width];
                            for (patches, x) in buffer
                                .chunks_exact_mut(taps * width)
                                .zip(x.chunks_exact(g.h * g.w))
                            {
                                unroll_channel(x, g, rows.clone(), patches);
                            }
                            Mat::new(&*buffer, channels * taps, width, width)
                        };
                        let dst = MatMut::new(out, channels * taps, g.o, g.o);
                        gemm(
                            dst,
                            b > 0 || from > 0,
                            T::one(),
                            patches,
                            grad.t(),
                            Threads::One,
                        );
                    }
                }
            });
        });
    let mut out = vec![T::zero(); patch * g.o];
    out.par_chunks_exact_mut(patch)
        .enumerate()
        .for_each(|(o, row)| {
            for (p, v) in row.iter_mut().enumerate() {
                *v = transposed[p * g.o + o];
            }
        });
    out
}
