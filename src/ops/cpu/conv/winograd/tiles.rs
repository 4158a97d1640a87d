//! The transforms of tiles: of the input, of the output's gradient, and of products to the output.

use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::super::Geometry;
use super::{Tiling, VALUES};
use crate::ops::cpu::real::Real;

/// `Bᵀ·d·B` of every input tile of a chunk: `[C, 16, tiles]`.
pub(super) fn transform_inputs<T: Real>(
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

/// A few rows of an image with zeros around it.
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
            width: 2 * cols + 2,
            pad_h,
            pad_w,
        }
    }

    fn len(&self) -> usize {
        self.height * self.width
    }

    /// Copies the pixels of a plane `[h, w]` that lie in this strip.
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

/// Calls `$block::<T, N>(from, …)` over `0..$cols` for blocks of `N` tiles, as large as they fit.
macro_rules! in_blocks {
    ($cols:expr, $block:ident($($argument:expr),*)) => {{
        let (mut from, cols) = (0, $cols);
        while from + 8 <= cols {
            $block::<T, 8>(from, $($argument),*);
            from += 8;
        }
        while from + 4 <= cols {
            $block::<T, 4>(from, $($argument),*);
            from += 4;
        }
        while from < cols {
            $block::<T, 1>(from, $($argument),*);
            from += 1;
        }
    }};
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
    for (row, strip) in padded.windows(4 * width).step_by(2 * width).enumerate() {
        let lines: [&[[T; 2]]; 4] =
            std::array::from_fn(|i| strip[i * width..][..width].as_chunks().0);
        in_blocks!(cols, input_block(&lines, out, tiles, at + row * cols));
    }
}

/// `N` neighbouring tiles; the lines are given as pairs of pixels.
#[inline(always)]
fn input_block<T: Real, const N: usize>(
    from: usize,
    lines: &[&[[T; 2]]; 4],
    out: &mut [T],
    tiles: usize,
    at: usize,
) {
    let mut columns = [[[T::zero(); N]; 4]; 4];
    for (columns, line) in columns.iter_mut().zip(lines) {
        let pairs = &line[from..][..N + 1];
        for t in 0..N {
            let ([a, b], [c, d]) = (pairs[t], pairs[t + 1]);
            columns[0][t] = a - c;
            columns[1][t] = b + c;
            columns[2][t] = c - b;
            columns[3][t] = b - d;
        }
    }
    for column in 0..4 {
        let [a, b, c, d] = columns.map(|row| row[column]);
        let mut values = [[T::zero(); N]; 4];
        for t in 0..N {
            values[0][t] = a[t] - c[t];
            values[1][t] = b[t] + c[t];
            values[2][t] = c[t] - b[t];
            values[3][t] = b[t] - d[t];
        }
        for (row, values) in values.iter().enumerate() {
            out[(4 * row + column) * tiles + at + from..][..N].copy_from_slice(values);
        }
    }
}

/// `A·d·Aᵀ` of every output gradient tile of a chunk: `[O, 16, tiles]`.
pub(super) fn transform_grads<T: Real>(
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
    for (row, strip) in padded.chunks_exact(2 * width).enumerate() {
        let (upper, lower) = strip.split_at(width);
        let lines = [upper.as_chunks().0, lower.as_chunks().0];
        in_blocks!(cols, grad_block(&lines, out, tiles, at + row * cols));
    }
}

/// `N` neighbouring tiles; the lines are given as pairs of pixels.
#[inline(always)]
fn grad_block<T: Real, const N: usize>(
    from: usize,
    lines: &[&[[T; 2]]; 2],
    out: &mut [T],
    tiles: usize,
    at: usize,
) {
    let mut columns = [[[T::zero(); N]; 4]; 2];
    for (columns, line) in columns.iter_mut().zip(lines) {
        for (t, &[a, b]) in line[from..][..N].iter().enumerate() {
            columns[0][t] = a;
            columns[1][t] = a + b;
            columns[2][t] = a - b;
            columns[3][t] = -b;
        }
    }
    for column in 0..4 {
        let [a, b] = columns.map(|row| row[column]);
        let mut values = [[T::zero(); N]; 4];
        for t in 0..N {
            values[0][t] = a[t];
            values[1][t] = a[t] + b[t];
            values[2][t] = a[t] - b[t];
            values[3][t] = -b[t];
        }
        for (row, values) in values.iter().enumerate() {
            out[(4 * row + column) * tiles + at + from..][..N].copy_from_slice(values);
        }
    }
}

/// `Aᵀ·m·A` of every product of a chunk `[16, O, tiles]`, into the rows of the output that the chunk covers. `bias` gives the
/// number that is added to each plane of the group.
pub(super) fn transform_outputs<T: Real>(
    products: &[T],
    out: &mut [T],
    bias: impl Fn(usize) -> T + Sync,
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
            let products = &products[o * tiles + image * rows * tiling.cols..];
            let pixels = 2 * first * w..h.min(2 * (first + rows)) * w;
            output_tiles(
                products,
                g.o * tiles,
                &mut out[pixels],
                w,
                tiling.cols,
                bias(plane),
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
        let (upper, lower) = out.split_at_mut(w); // lower is empty where the last row of tiles has one row of pixels
        let products = &products[row * cols..];
        in_blocks!(cols, output_block(products, stride, upper, lower, bias));
    }
}

/// `N` neighbouring tiles.
#[inline(always)]
fn output_block<T: Real, const N: usize>(
    from: usize,
    products: &[T],
    stride: usize,
    upper: &mut [T],
    lower: &mut [T],
    bias: T,
) {
    let mut sums = [[[T::zero(); N]; 4]; 2];
    for column in 0..4 {
        let value = |row: usize| &products[(4 * row + column) * stride + from..][..N];
        let (a, b, c, d) = (value(0), value(1), value(2), value(3));
        for t in 0..N {
            sums[0][column][t] = a[t] + b[t] + c[t];
            sums[1][column][t] = b[t] - c[t] - d[t];
        }
    }
    for ([a, b, c, d], line) in sums.iter().zip([upper, lower]) {
        let mut pixels = [[T::zero(); 2]; N];
        for (t, pixels) in pixels.iter_mut().enumerate() {
            *pixels = [a[t] + b[t] + c[t] + bias, b[t] - c[t] - d[t] + bias];
        }
        let pixels = pixels.as_flattened();
        match line.get_mut(2 * from..2 * (from + N)) {
            Some(line) => line.copy_from_slice(pixels),
            // The last column of tiles may have one column of pixels, and the last row none.
            None => {
                for (o, &v) in line.iter_mut().skip(2 * from).zip(pixels) {
                    *o = v;
                }
            }
        }
    }
}
