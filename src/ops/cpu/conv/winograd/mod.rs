//! 3x3 stride-1 convolution by Winograd's minimal filtering F(2x2, 3x3): 2.25 times fewer multiplications.
//!
//! Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). The image is cut into tiles of 2x2 output
//! pixels; each sees 4x4 input pixels. Tiles and kernels are transformed to 16 values, in which the convolution is 16 matrix
//! products over channels, one for each value. All transforms add and halve, so the result is about as exact as the direct
//! sum. A few rows of tiles are computed at a time, so that the transformed values stay in cache.
//!
//! Which tiles go together depends on the shape alone: no sum depends on the threads.

#![allow(
    clippy::needless_range_loop,
    reason = "rows and columns of small matrices read best as indices"
)]

mod kernels;
mod tiles;

use rayon::prelude::*;

use self::kernels::transform_kernels;
use self::tiles::{transform_grads, transform_inputs, transform_outputs};
use super::Geometry;
use crate::ops::cpu::gemm::{Mat, MatMut, Threads, gemm};
use crate::ops::cpu::real::Real;

/// Values of a transformed tile or kernel.
const VALUES: usize = 16;
/// Bytes of transformed input at a time: about half of a core's second-level cache.
const CHUNK_BYTES: usize = 1 << 20;

/// Whether this algorithm applies and is faster than unrolled patches.
pub(super) fn pays(batch: usize, g: &Geometry) -> bool {
    let three = g.kh == 3 && g.kw == 3 && g.stride == 1 && g.pad_h <= 2 && g.pad_w <= 2;
    three && g.c.min(g.o) >= 16 && batch * tiles(g.out_h(), g.out_w()) >= enough(g.c, g.o)
}

/// Tiles of an output of `h` by `w` pixels.
pub(super) fn tiles(h: usize, w: usize) -> usize {
    h.div_ceil(2) * w.div_ceil(2)
}

/// Tiles for which transforming the kernels is worth it: they are many bytes, and each is used once a tile.
pub(super) fn enough(inputs: usize, outputs: usize) -> usize {
    let kernel_bytes = VALUES * inputs * outputs * size_of::<f32>();
    if kernel_bytes > 4 << 20 { 96 } else { 32 }
}

/// How a batch is cut into chunks of tiles.
#[derive(Clone, Copy)]
struct Tiling {
    /// Rows and columns of tiles of one image.
    rows: usize,
    cols: usize,
    /// Images of a group, which one task computes.
    images: usize,
    /// Rows of tiles of a chunk; all of them when a group has several images.
    chunk_rows: usize,
}

impl Tiling {
    fn new<T>(batch: usize, g: &Geometry) -> Self {
        let (rows, cols) = (g.out_h().div_ceil(2), g.out_w().div_ceil(2));
        let tile_bytes = VALUES * g.c.max(g.o) * size_of::<T>();
        let tiles = (CHUNK_BYTES / tile_bytes).clamp(64, 512);
        Self {
            rows,
            cols,
            images: (tiles / (rows * cols)).clamp(1, batch),
            chunk_rows: (tiles / cols).clamp(1, rows),
        }
    }

    /// Calls `work` with the first row and the number of rows of each chunk of a group.
    fn each_chunk(&self, mut work: impl FnMut(usize, usize)) {
        for first in (0..self.rows).step_by(self.chunk_rows) {
            work(first, self.chunk_rows.min(self.rows - first));
        }
    }

    /// Tiles of the largest chunk.
    fn largest(&self) -> usize {
        self.images * self.chunk_rows * self.cols
    }
}

/// The convolution: `x` `[B, C, H, W]`, `weight` `[O, C, 3, 3]`, `bias` `[O]` or `[B, O]`.
pub(super) fn forward<T: Real>(
    x: &[T],
    weight: &[T],
    bias: &[T],
    batch: usize,
    g: &Geometry,
) -> Vec<T> {
    let kernels = transform_kernels(weight, g);
    let kernel = |value: usize| Mat::new(&kernels[value * g.c..], g.o, g.c, VALUES * g.c);
    convolve(x, kernel, Some(bias), batch, g)
}

/// The input's gradient: a convolution of the output's gradient with the kernels turned by 180 degrees, which in transformed
/// kernels exchanges first and last rows and columns.
pub(super) fn input_grad<T: Real>(grad: &[T], weight: &[T], batch: usize, g: &Geometry) -> Vec<T> {
    const TURNED: [usize; 4] = [3, 1, 2, 0];
    let kernels = transform_kernels(weight, g);
    let kernel = |value: usize| {
        let value = 4 * TURNED[value / 4] + TURNED[value % 4];
        Mat::new(&kernels[value * g.c..], g.o, g.c, VALUES * g.c).t()
    };
    convolve(grad, kernel, None, batch, &g.turned())
}

fn convolve<'k, T: Real>(
    x: &[T],
    kernel: impl Fn(usize) -> Mat<'k, T> + Sync,
    bias: Option<&[T]>,
    batch: usize,
    g: &Geometry,
) -> Vec<T> {
    let tiling = Tiling::new::<T>(batch, g);
    let (image, result) = (g.c * g.h * g.w, g.o * g.out_pixels());
    let mut out = vec![T::zero(); batch * result];
    out.par_chunks_mut(tiling.images * result)
        .zip(x.par_chunks(tiling.images * image))
        .enumerate()
        .for_each(|(group, (out, x))| {
            let plane = group * tiling.images * g.o; // the first of the group, counted over the batch
            let bias = |o: usize| bias.map_or(T::zero(), |bias| bias[(plane + o) % bias.len()]);
            let largest = VALUES * tiling.largest();
            T::with_scratch((g.c + g.o) * largest, |buffer| {
                let (inputs, products) = buffer.split_at_mut(g.c * largest);
                let images = x.len() / image;
                tiling.each_chunk(|first, rows| {
                    let tiles = images * rows * tiling.cols;
                    let inputs = &mut inputs[..g.c * VALUES * tiles];
                    let products = &mut products[..g.o * VALUES * tiles];
                    transform_inputs(x, inputs, g, tiling, first, rows);
                    products
                        .par_chunks_exact_mut(g.o * tiles)
                        .enumerate()
                        .for_each(|(value, product)| {
                            let dst = MatMut::new(product, g.o, tiles, tiles);
                            let inputs =
                                Mat::new(&inputs[value * tiles..], g.c, tiles, VALUES * tiles);
                            gemm(dst, false, T::one(), kernel(value), inputs, Threads::One);
                        });
                    transform_outputs(products, out, bias, g, tiling, first, rows);
                });
            });
        });
    out
}

/// The weight's gradient `[O, C, 3, 3]`: the products of transformed input and transformed output gradient, summed over tiles
/// chunk after chunk, and transformed back.
pub(super) fn weight_grad<T: Real>(x: &[T], grad: &[T], batch: usize, g: &Geometry) -> Vec<T> {
    let tiling = Tiling::new::<T>(batch, g);
    let (image, result) = (g.c * g.h * g.w, g.o * g.out_pixels());
    let mut sums = vec![T::zero(); VALUES * g.o * g.c];
    let largest = VALUES * tiling.largest();
    T::with_scratch((g.c + g.o) * largest, |buffer| {
        let (inputs, grads) = buffer.split_at_mut(g.c * largest);
        let groups = x
            .chunks(tiling.images * image)
            .zip(grad.chunks(tiling.images * result));
        for (group, (x, grad)) in groups.enumerate() {
            let images = x.len() / image;
            tiling.each_chunk(|first, rows| {
                let tiles = images * rows * tiling.cols;
                let inputs = &mut inputs[..g.c * VALUES * tiles];
                let grads = &mut grads[..g.o * VALUES * tiles];
                transform_inputs(x, inputs, g, tiling, first, rows);
                transform_grads(grad, grads, g, tiling, first, rows);
                sums.par_chunks_exact_mut(g.o * g.c)
                    .enumerate()
                    .for_each(|(value, sum)| {
                        let view = |of, channels| Mat::new(of, channels, tiles, VALUES * tiles);
                        let (grads, inputs) = (&grads[value * tiles..], &inputs[value * tiles..]);
                        gemm(
                            MatMut::new(sum, g.o, g.c, g.c),
                            group > 0 || first > 0,
                            T::one(),
                            view(grads, g.o),
                            view(inputs, g.c).t(),
                            Threads::One,
                        );
                    });
            });
        }
    });
    kernels::gradients(&sums, g)
}

#[cfg(test)]
mod tests {
    use super::super::patches;
    use super::*;
    use crate::ops::gradcheck::random;

    fn values(shape: &[usize], seed: u64) -> Vec<f64> {
        random(shape, seed)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    fn assert_close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-11, "{got} {want}");
        }
    }

    /// Against patches: odd and even sides, sides below a block and above, several images a group and chunks an image.
    #[test]
    fn equals_the_direct_sum() {
        for (batch, c, o, h, w, pad) in [
            (1, 3, 2, 4, 4, 1),
            (2, 18, 17, 5, 7, 1),
            (5, 2, 3, 16, 16, 1),
            (1, 2, 2, 9, 40, 0),
            (3, 1, 4, 6, 3, 2),
            (2, 2, 1, 70, 66, 1),
        ] {
            let g = Geometry {
                c,
                h,
                w,
                o,
                kh: 3,
                kw: 3,
                stride: 1,
                pad_h: pad,
                pad_w: pad,
            };
            let (x, weight) = (values(&[batch, c, h, w], 1), values(&[o, c, 3, 3], 2));
            let bias = values(&[o], 3);
            let grad = values(&[batch, o, g.out_h(), g.out_w()], 4);
            assert_close(
                &forward(&x, &weight, &bias, batch, &g),
                &patches::forward(&x, &weight, Some(&bias), batch, &g),
            );
            assert_close(
                &input_grad(&grad, &weight, batch, &g),
                &patches::input_grad_by_convolution(&grad, &weight, batch, &g),
            );
            assert_close(
                &weight_grad(&x, &grad, batch, &g),
                &patches::weight_grad(&x, &grad, batch, &g),
            );
        }
    }
}
