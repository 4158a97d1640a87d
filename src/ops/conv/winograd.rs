//! 3x3 stride-1 convolution by Winograd's minimal filtering F(2x2, 3x3): 2.25 times fewer multiplications.
//!
//! Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). The image is cut into tiles of 2x2 output
//! pixels; each sees 4x4 input pixels. Tiles and kernels are transformed to 16 values, in which the convolution is 16 matrix
//! products over channels, one for each value. All transforms add and halve, so the result is about as exact as the direct
//! sum. Rows of tiles are worked off a few at a time, so that what is transformed stays in cache.
//!
//! Which tiles go together depends on the shape alone: no sum depends on the threads.

#![allow(
    clippy::needless_range_loop,
    reason = "rows and columns of small matrices read best as indices"
)]

use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::super::cpu::{Real, real};
use super::super::gemm::{Mat, MatMut, Threads, gemm};
use super::Geometry;

/// Values of a transformed tile or kernel.
const VALUES: usize = 16;
/// Tiles of a row that are transformed together.
const BLOCK: usize = 8;
/// Bytes of transformed input worked on at a time: about half of a core's second-level cache.
const CHUNK_BYTES: usize = 1 << 20;

/// Whether this way is faster than unrolled patches. Transforming the kernels must be worth it: they are many bytes, and each
/// is used once a tile.
pub(super) fn pays(batch: usize, g: &Geometry) -> bool {
    let three = g.kh == 3 && g.kw == 3 && g.stride == 1 && g.pad_h <= 2 && g.pad_w <= 2;
    let tiles = batch * g.out_h().div_ceil(2) * g.out_w().div_ceil(2);
    let kernel_bytes = VALUES * g.c * g.o * size_of::<f32>();
    three && g.c.min(g.o) >= 16 && tiles >= if kernel_bytes > 4 << 20 { 96 } else { 32 }
}

/// How a batch is cut into chunks of tiles.
#[derive(Clone, Copy)]
struct Tiling {
    /// Rows and columns of tiles of one image.
    rows: usize,
    cols: usize,
    /// Images of a group, which one task works on.
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

/// The convolution: `x` `[B, C, H, W]`, `weight` `[O, C, 3, 3]`, `bias` `[O]`.
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
        .for_each(|(out, x)| {
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
    let mut out = vec![T::zero(); 9 * g.o * g.c];
    out.par_chunks_exact_mut(9 * g.c)
        .enumerate()
        .for_each(|(o, out)| kernels_back(&sums[o * g.c..], g.o * g.c, out));
    out
}

/// `G·k·Gᵀ` of every kernel: `[O, 16, C]`.
fn transform_kernels<T: Real>(weight: &[T], g: &Geometry) -> Vec<T> {
    let mut out = vec![T::zero(); VALUES * g.o * g.c];
    out.par_chunks_exact_mut(VALUES * g.c)
        .zip(weight.par_chunks_exact(9 * g.c))
        .for_each(|(out, kernels)| kernels_forth(kernels, out));
    out
}

/// Kernels that are transformed together.
const KERNELS: usize = 16;

/// The transform of one output channel's kernels: `[C, 9]` → `[16, C]`.
#[pulp::with_simd(kernels_forth = Arch::new())]
#[inline(always)]
fn kernels_forth_on<S: Simd, T: Real>(_: S, kernels: &[T], out: &mut [T]) {
    let channels = out.len() / VALUES;
    let half: T = real(0.5);
    for (index, kernels) in kernels.chunks(9 * KERNELS).enumerate() {
        let count = kernels.len() / 9;
        let mut k = [[T::zero(); KERNELS]; 9];
        for (lane, kernel) in kernels.chunks_exact(9).enumerate() {
            for (k, &v) in k.iter_mut().zip(kernel) {
                k[lane] = v;
            }
        }
        // Columns first: three rows of four.
        let mut rows = [[[T::zero(); KERNELS]; 4]; 3];
        for (row, k) in rows.iter_mut().zip(k.chunks_exact(3)) {
            for l in 0..KERNELS {
                let (sum, middle) = (k[0][l] + k[2][l], k[1][l]);
                row[0][l] = k[0][l];
                row[1][l] = half * (sum + middle);
                row[2][l] = half * (sum - middle);
                row[3][l] = k[2][l];
            }
        }
        for column in 0..4 {
            let mut values = [[T::zero(); KERNELS]; 4];
            for l in 0..KERNELS {
                let (a, b, c) = (rows[0][column][l], rows[1][column][l], rows[2][column][l]);
                values[0][l] = a;
                values[1][l] = half * (a + c + b);
                values[2][l] = half * (a + c - b);
                values[3][l] = c;
            }
            for (row, values) in values.iter().enumerate() {
                let at = (4 * row + column) * channels + index * KERNELS;
                out[at..at + count].copy_from_slice(&values[..count]);
            }
        }
    }
}

/// `Gᵀ·s·G`, the transform of summed products to the gradients of one output channel's kernels: rows of `[16, …]` that are
/// `stride` apart → `[C, 9]`.
#[pulp::with_simd(kernels_back = Arch::new())]
#[inline(always)]
fn kernels_back_on<S: Simd, T: Real>(_: S, sums: &[T], stride: usize, out: &mut [T]) {
    let half: T = real(0.5);
    for (index, out) in out.chunks_mut(9 * KERNELS).enumerate() {
        let count = out.len() / 9;
        let mut s = [[T::zero(); KERNELS]; VALUES];
        for (value, s) in s.iter_mut().enumerate() {
            let at = value * stride + index * KERNELS;
            s[..count].copy_from_slice(&sums[at..at + count]);
        }
        // Rows first: three rows of four.
        let mut rows = [[[T::zero(); KERNELS]; 4]; 3];
        for column in 0..4 {
            for l in 0..KERNELS {
                let (b, c) = (half * s[4 + column][l], half * s[8 + column][l]);
                rows[0][column][l] = s[column][l] + b + c;
                rows[1][column][l] = b - c;
                rows[2][column][l] = b + c + s[12 + column][l];
            }
        }
        let mut k = [[T::zero(); KERNELS]; 9];
        for (k, row) in k.chunks_exact_mut(3).zip(&rows) {
            for l in 0..KERNELS {
                let (b, c) = (half * row[1][l], half * row[2][l]);
                k[0][l] = row[0][l] + b + c;
                k[1][l] = b - c;
                k[2][l] = b + c + row[3][l];
            }
        }
        for (lane, kernel) in out.chunks_exact_mut(9).enumerate() {
            for (v, k) in kernel.iter_mut().zip(&k) {
                *v = k[lane];
            }
        }
    }
}

/// `Bᵀ·d·B` of every input tile of a chunk: `[C, 16, tiles]`.
fn transform_inputs<T: Real>(
    x: &[T],
    out: &mut [T],
    g: &Geometry,
    tiling: Tiling,
    first: usize,
    rows: usize,
) {
    let (plane, tiles) = (g.h * g.w, out.len() / (g.c * VALUES));
    let strip = Strip::new(2 * first, 2 * rows + 2, tiling.cols, (g.pad_h, g.pad_w));
    out.par_chunks_exact_mut(VALUES * tiles)
        .enumerate()
        .with_min_len(4)
        .for_each(|(c, out)| {
            T::with_scratch(strip.len(), |padded| {
                for (image, x) in x.chunks_exact(g.c * plane).enumerate() {
                    strip.copy(&x[c * plane..][..plane], g.h, g.w, padded);
                    let at = image * rows * tiling.cols;
                    input_tiles(padded, strip.width, out, tiles, at, tiling.cols);
                }
            });
        });
}

/// A few rows of an image with zeros around it, wide enough for whole blocks of tiles.
#[derive(Clone, Copy)]
struct Strip {
    /// First row, counted in the padded image.
    first: usize,
    height: usize,
    width: usize,
    pad_h: usize,
    pad_w: usize,
}

impl Strip {
    fn new(first: usize, height: usize, cols: usize, (pad_h, pad_w): (usize, usize)) -> Self {
        Self {
            first,
            height,
            width: 2 * cols.next_multiple_of(BLOCK) + 2,
            pad_h,
            pad_w,
        }
    }

    fn len(&self) -> usize {
        self.height * self.width
    }

    /// Copies what lies in this strip from a plane `[h, w]`.
    fn copy<T: Real>(&self, plane: &[T], h: usize, w: usize, out: &mut [T]) {
        out.fill(T::zero());
        let width = w.min(self.width - self.pad_w);
        for (row, out) in out.chunks_exact_mut(self.width).enumerate() {
            let y = (self.first + row).checked_sub(self.pad_h);
            if let Some(y) = y.filter(|&y| y < h) {
                out[self.pad_w..][..width].copy_from_slice(&plane[y * w..][..width]);
            }
        }
    }
}

/// Transforms the tiles of a strip whose rows are `width` long into `out` `[16, tiles]` from column `at` on.
#[pulp::with_simd(input_tiles = Arch::new())]
#[inline(always)]
fn input_tiles_on<S: Simd, T: Real>(
    _: S,
    padded: &[T],
    width: usize,
    out: &mut [T],
    tiles: usize,
    at: usize,
    cols: usize,
) {
    let rows = (padded.len() / width - 2) / 2;
    for row in 0..rows {
        let strip = &padded[2 * row * width..][..4 * width];
        for from in (0..cols).step_by(BLOCK) {
            let count = BLOCK.min(cols - from);
            let at = at + row * cols + from;
            let line = |i: usize| -> &[T] { &strip[i * width + 2 * from..][..2 * BLOCK + 2] };
            let (a, b, c, d) = (line(0), line(1), line(2), line(3));
            let differences = [
                std::array::from_fn(|i| a[i] - c[i]),
                std::array::from_fn(|i| b[i] + c[i]),
                std::array::from_fn(|i| c[i] - b[i]),
                std::array::from_fn(|i| b[i] - d[i]),
            ];
            for (row, line) in differences.iter().enumerate() {
                let values = input_columns(line);
                for (column, values) in values.iter().enumerate() {
                    let out = &mut out[(4 * row + column) * tiles + at..];
                    put(values, &mut out[..count]);
                }
            }
        }
    }
}

/// `d·B` for one row of overlapping tiles.
#[inline(always)]
fn input_columns<T: Real>(line: &[T; 2 * BLOCK + 2]) -> [[T; BLOCK]; 4] {
    let mut values = [[T::zero(); BLOCK]; 4];
    for t in 0..BLOCK {
        let [a, b, c, d] = [
            line[2 * t],
            line[2 * t + 1],
            line[2 * t + 2],
            line[2 * t + 3],
        ];
        values[0][t] = a - c;
        values[1][t] = b + c;
        values[2][t] = c - b;
        values[3][t] = b - d;
    }
    values
}

/// Copies the first values of a block; a whole block without a call.
#[inline(always)]
fn put<T: Real>(block: &[T; BLOCK], out: &mut [T]) {
    match <&mut [T; BLOCK]>::try_from(&mut *out) {
        Ok(out) => *out = *block,
        Err(_) => {
            for (o, &v) in out.iter_mut().zip(block) {
                *o = v;
            }
        }
    }
}

/// A block of values, filled up with zeros.
#[inline(always)]
fn get<T: Real>(x: &[T]) -> [T; BLOCK] {
    match <&[T; BLOCK]>::try_from(x) {
        Ok(x) => *x,
        Err(_) => {
            let mut block = [T::zero(); BLOCK];
            for (b, &v) in block.iter_mut().zip(x) {
                *b = v;
            }
            block
        }
    }
}

/// `A·d·Aᵀ` of every output gradient tile of a chunk: `[O, 16, tiles]`.
fn transform_grads<T: Real>(
    grad: &[T],
    out: &mut [T],
    g: &Geometry,
    tiling: Tiling,
    first: usize,
    rows: usize,
) {
    let (h, w) = (g.out_h(), g.out_w());
    let (plane, tiles) = (h * w, out.len() / (g.o * VALUES));
    let strip = Strip::new(2 * first, 2 * rows, tiling.cols, (0, 0));
    out.par_chunks_exact_mut(VALUES * tiles)
        .enumerate()
        .with_min_len(4)
        .for_each(|(o, out)| {
            T::with_scratch(strip.len(), |padded| {
                for (image, grad) in grad.chunks_exact(g.o * plane).enumerate() {
                    strip.copy(&grad[o * plane..][..plane], h, w, padded);
                    let at = image * rows * tiling.cols;
                    grad_tiles(padded, strip.width, out, tiles, at, tiling.cols);
                }
            });
        });
}

/// As [`input_tiles`], for tiles of 2x2.
#[pulp::with_simd(grad_tiles = Arch::new())]
#[inline(always)]
fn grad_tiles_on<S: Simd, T: Real>(
    _: S,
    padded: &[T],
    width: usize,
    out: &mut [T],
    tiles: usize,
    at: usize,
    cols: usize,
) {
    let rows = padded.len() / width / 2;
    for row in 0..rows {
        let strip = &padded[2 * row * width..][..2 * width];
        for from in (0..cols).step_by(BLOCK) {
            let count = BLOCK.min(cols - from);
            let at = at + row * cols + from;
            let line = |i: usize| -> &[T] { &strip[i * width + 2 * from..][..2 * BLOCK] };
            let (a, b) = (line(0), line(1));
            let sums: [[T; 2 * BLOCK]; 4] = [
                std::array::from_fn(|i| a[i]),
                std::array::from_fn(|i| a[i] + b[i]),
                std::array::from_fn(|i| a[i] - b[i]),
                std::array::from_fn(|i| -b[i]),
            ];
            for (row, line) in sums.iter().enumerate() {
                let values = grad_columns(line);
                for (column, values) in values.iter().enumerate() {
                    let out = &mut out[(4 * row + column) * tiles + at..];
                    put(values, &mut out[..count]);
                }
            }
        }
    }
}

/// `d·Aᵀ` for one row of tiles.
#[inline(always)]
fn grad_columns<T: Real>(line: &[T; 2 * BLOCK]) -> [[T; BLOCK]; 4] {
    let mut values = [[T::zero(); BLOCK]; 4];
    for t in 0..BLOCK {
        let (a, b) = (line[2 * t], line[2 * t + 1]);
        values[0][t] = a;
        values[1][t] = a + b;
        values[2][t] = a - b;
        values[3][t] = -b;
    }
    values
}

/// `Aᵀ·m·A` of every product of a chunk `[16, O, tiles]`, into the rows of the output that the chunk covers.
fn transform_outputs<T: Real>(
    products: &[T],
    out: &mut [T],
    bias: Option<&[T]>,
    g: &Geometry,
    tiling: Tiling,
    first: usize,
    rows: usize,
) {
    let (h, w) = (g.out_h(), g.out_w());
    let tiles = products.len() / (g.o * VALUES);
    out.par_chunks_exact_mut(h * w)
        .enumerate()
        .with_min_len(4)
        .for_each(|(plane, out)| {
            let (image, o) = (plane / g.o, plane % g.o);
            let bias = bias.map_or(T::zero(), |bias| bias[o]);
            let products = &products[o * tiles + image * rows * tiling.cols..];
            let pixels = 2 * first * w..h.min(2 * (first + rows)) * w;
            output_tiles(
                products,
                g.o * tiles,
                &mut out[pixels],
                w,
                tiling.cols,
                bias,
            );
        });
}

/// Transforms products whose values are `stride` apart into rows of pixels, `w` long, and adds the bias.
#[pulp::with_simd(output_tiles = Arch::new())]
#[inline(always)]
fn output_tiles_on<S: Simd, T: Real>(
    _: S,
    products: &[T],
    stride: usize,
    out: &mut [T],
    w: usize,
    cols: usize,
    bias: T,
) {
    for (row, out) in out.chunks_mut(2 * w).enumerate() {
        let (upper, lower) = out.split_at_mut(w);
        for from in (0..cols).step_by(BLOCK) {
            let count = BLOCK.min(cols - from);
            let mut sums = [[[T::zero(); BLOCK]; 4]; 2];
            for column in 0..4 {
                let value = |row_of: usize| {
                    let at = (4 * row_of + column) * stride + row * cols + from;
                    get(&products[at..][..count])
                };
                let (a, b, c, d) = (value(0), value(1), value(2), value(3));
                for t in 0..BLOCK {
                    sums[0][column][t] = a[t] + b[t] + c[t];
                    sums[1][column][t] = b[t] - c[t] - d[t];
                }
            }
            for (s, line) in sums.iter().zip([&mut *upper, &mut *lower]) {
                let mut pixels = [T::zero(); 2 * BLOCK];
                for t in 0..BLOCK {
                    pixels[2 * t] = s[0][t] + s[1][t] + s[2][t] + bias;
                    pixels[2 * t + 1] = s[1][t] - s[2][t] - s[3][t] + bias;
                }
                let Some(line) = line.get_mut(2 * from..) else {
                    continue; // the last row of tiles may have one row of pixels only
                };
                match line.first_chunk_mut::<{ 2 * BLOCK }>() {
                    Some(line) => *line = pixels,
                    None => {
                        for (o, &v) in line.iter_mut().zip(&pixels) {
                            *o = v;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::gradcheck::random;
    use super::super::patches;
    use super::*;

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
