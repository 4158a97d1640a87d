//! A bounds-checked face to the `gemm` crate: strided views over slices in, one matrix product out.
//!
//! This is the only module of `ops` with `unsafe` code: `gemm::gemm` takes raw pointers, and every view is checked
//! against its slice before a pointer is made of it.
#![allow(unsafe_code)]

use super::cpu::Real;

/// How a product may use threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// Stay on the calling thread: the caller already runs one task a core.
    One,
    /// Split over rayon's pool.
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

/// `dst = alpha · lhs · rhs`, or `dst += …` when `accumulate`.
///
/// The order of every sum depends on the shapes alone, so the result is the same for any number of threads.
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
    // SAFETY: each view was checked to lie inside its slice when it was made, the shapes agree, `T` is `f32` or
    // `f64` (the only implementors of `Real`), and `dst` is borrowed mutably so it aliases neither input.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_views_transposes_and_accumulation() {
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

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_outside_its_slice_is_refused() {
        let _ = Mat::new(&[0f32; 5], 2, 3, 3);
    }
}
