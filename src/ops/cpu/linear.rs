//! [`ops::linear`](crate::ops::linear()) on the CPU: one matrix product.

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, gemm};
use super::kernel::{Kernel, apply};
use super::real::Real;
use super::reduce::sum_rows;
use crate::ops::bias_or_zeros;

/// As [`crate::ops::linear()`], which checks the shapes and gives that of the result.
pub(in crate::ops) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Shape,
) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let kernel = LinearKernel {
        rows: x.elem_count() / inner.max(1),
        inner,
        out,
        biased: bias.is_some(),
        shape,
    };
    apply(kernel, [x, weight, &bias_or_zeros(bias, out, x)?])
}

/// Rows that one task fills, and rows of a partial sum of the bias's gradient; fixed, so that sums do not depend on the
/// number of threads.
pub(super) const BIAS_ROWS: usize = 256;

struct LinearKernel {
    rows: usize,
    inner: usize,
    out: usize,
    biased: bool,
    shape: Shape,
}

impl Kernel<3> for LinearKernel {
    const NAME: &'static str = "linear";

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let (m, k, n) = (self.rows, self.inner, self.out);
        let mut y = vec![T::zero(); m * n];
        if self.biased {
            y.par_chunks_mut(BIAS_ROWS * n).for_each(|rows| {
                for row in rows.chunks_exact_mut(n) {
                    row.copy_from_slice(bias);
                }
            });
        }
        let (x, weight) = (Mat::new(x, m, k, k), Mat::new(weight, n, k, k));
        let dst = MatMut::new(&mut y, m, n, n);
        gemm(dst, self.biased, T::one(), x, weight.t(), Threads::Pool);
        y
    }

    fn backward<T: Real>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [want_x, want_weight, want_bias]: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let (m, k, n) = (self.rows, self.inner, self.out);
        let g = Mat::new(grad, m, n, n);
        let gx = want_x.then(|| {
            let mut out = vec![T::zero(); m * k];
            let dst = MatMut::new(&mut out, m, k, k);
            let weight = Mat::new(weight, n, k, k);
            gemm(dst, false, T::one(), g, weight, Threads::Pool);
            out
        });
        let gw = want_weight.then(|| {
            let mut out = vec![T::zero(); n * k];
            let dst = MatMut::new(&mut out, n, k, k);
            gemm(
                dst,
                false,
                T::one(),
                g.t(),
                Mat::new(x, m, k, k),
                Threads::Pool,
            );
            out
        });
        [gx, gw, want_bias.then(|| sum_rows(grad, n, BIAS_ROWS))]
    }
}
