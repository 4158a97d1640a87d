//! The matrix product of the `gemm` crate, over bounds-checked strided views of slices.
//!
//! This is the only module of `ops` with `unsafe` code: `gemm::gemm` takes raw pointers. Every view is checked against its
//! slice before a pointer is made of it.
#![allow(unsafe_code)]

use super::real::Real;

/// The threads of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// The calling thread: the caller already runs one task on each core.
    One,
    /// The threads of rayon's pool.
    Pool,
}

/// A read-only matrix over a slice, with row and column strides in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// `count` rows from `first` on.
    pub(super) fn rows(self, first: usize, count: usize) -> Self {
        assert!(
            first + count <= self.rows,
            "rows {first}.. of {}",
            self.rows
        );
        Self {
            data: &self.data[first * self.row_stride..],
            rows: count,
            ..self
        }
    }

    /// The transpose: no data moves.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A writable row-major matrix over a slice.
#[derive(Debug)]
pub(super) struct MatMut<'a, T> {
    data: &'a mut [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(super) fn new(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
        }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(
        rows == 0 || cols == 0 || (cols <= row_stride && (rows - 1) * row_stride + cols <= len),
        "a {rows}x{cols} matrix with row stride {row_stride} does not fit in {len} elements"
    );
}

/// Products that are summed one after the other as a block; the blocks' sums are added in order. The `gemm` crate splits longer
/// sums by the size of the machine's caches and by the other two sides, and leaves shorter ones whole.
const DEPTH: usize = 512;

/// `dst = alpha · lhs · rhs`, or `dst += …` if `accumulate`. `lhs`: `[M, K]`, `rhs`: `[K, N]`, `dst`: `[M, N]`.
///
/// The order of every sum depends on its length alone: the result is the same for any number of threads, of rows and columns
/// beside it (as long as there is more than one of each), and on any machine with fused products.
pub(super) fn gemm<T: Real>(
    dst: MatMut<'_, T>,
    accumulate: bool,
    alpha: T,
    lhs: Mat<'_, T>,
    rhs: Mat<'_, T>,
    threads: Threads,
) {
    assert!(
        lhs.rows == dst.rows && rhs.cols == dst.cols && lhs.cols == rhs.rows,
        "matrix product of {}x{} and {}x{} into {}x{}",
        lhs.rows,
        lhs.cols,
        rhs.rows,
        rhs.cols,
        dst.rows,
        dst.cols
    );
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::Pool => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    for from in (0..lhs.cols.max(1)).step_by(DEPTH) {
        let depth = DEPTH.min(lhs.cols - from);
        // SAFETY: each view was checked to lie inside its slice when it was made and the block of columns and rows lies inside
        // its view, the shapes agree, `T` is `f32` or `f64` (the only implementors of `Real`), and `dst` is borrowed mutably
        // so it aliases neither input.
        unsafe {
            gemm::gemm(
                dst.rows,
                dst.cols,
                depth,
                dst.data.as_mut_ptr(),
                1,
                dst.row_stride as isize,
                accumulate || from > 0,
                lhs.data.as_ptr().wrapping_add(from * lhs.col_stride),
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                rhs.data.as_ptr().wrapping_add(from * rhs.row_stride),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                T::one(), // gemm's alpha scales dst, its beta the product
                alpha,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_takes_strides_transposes_and_accumulates() {
        // lhs 2x3 inside a 2x4 buffer, rhs given transposed.
        let lhs = [1f32, 2., 3., 9., 4., 5., 6., 9.];
        let rhs_t = [1f32, 0., 1., 0., 1., 1.];
        let mut out = [100f32; 4];
        let (l, r) = (Mat::new(&lhs, 2, 3, 4), Mat::new(&rhs_t, 2, 3, 3).t());
        gemm(
            MatMut::new(&mut out, 2, 2, 2),
            false,
            2.0,
            l,
            r,
            Threads::One,
        );
        assert_eq!(out, [8., 10., 20., 22.]);
        gemm(
            MatMut::new(&mut out, 2, 2, 2),
            true,
            1.0,
            l,
            r,
            Threads::Pool,
        );
        assert_eq!(out, [12., 15., 30., 33.]);
    }

    /// Sums longer than a block, alone and among other rows and columns, on one thread and on several.
    #[test]
    fn gemm_element_does_not_depend_on_its_neighbours() {
        let (rows, depth, cols) = (70, 2 * DEPTH + 300, 90);
        let values = |count: usize, step: usize| -> Vec<f32> {
            let value = |i: usize| (i * step % 1009) as f32 / 1009.0 - 0.5;
            (0..count).map(value).collect()
        };
        let (lhs, rhs) = (values(rows * depth, 7), values(depth * cols, 11));
        let product = |rows: usize, width: usize, threads| {
            let mut out = vec![0f32; rows * width];
            gemm(
                MatMut::new(&mut out, rows, width, width),
                false,
                1.0,
                Mat::new(&lhs, rows, depth, depth),
                Mat::new(&rhs, depth, width, cols),
                threads,
            );
            out
        };
        let whole = product(rows, cols, Threads::Pool);
        let some = product(3, 5, Threads::One);
        for (row, some) in some.chunks_exact(5).enumerate() {
            assert_eq!(some, &whole[row * cols..][..5]);
        }
        // The expected sum: products one after the other in each block, the blocks' sums in order.
        let element = |row: usize, col: usize| {
            let at = |i: usize| (lhs[row * depth + i], rhs[i * cols + col]);
            (0..depth).step_by(DEPTH).fold(0f32, |sum, from| {
                let block = from..(from + DEPTH).min(depth);
                sum + block.map(at).fold(0f32, |sum, (a, b)| a.mul_add(b, sum))
            })
        };
        for (row, col) in [(0, 0), (17, 63), (69, 89)] {
            assert_eq!(whole[row * cols + col], element(row, col));
        }
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn gemm_refuses_a_view_outside_its_slice() {
        let _ = Mat::new(&[0f32; 5], 2, 3, 3);
    }
}
