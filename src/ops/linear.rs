//! Affine maps over the last dimension.

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use super::cpu::{Real, real};
use super::gemm::{Mat, MatMut, Threads, gemm};
use super::kernel::{Kernel, apply3, has_kernel};

/// `x · weightᵀ + bias` over the last dimension, as `torch.nn.functional.linear`.
///
/// `x`: `[…, in]`, `weight`: `[out, in]`, `bias`: `[out]` or none → `[…, out]`.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == inner => *last = out,
        _ => candle_core::bail!(
            "linear: x is {:?} but weight is {:?}",
            x.dims(),
            weight.dims()
        ),
    }
    if !has_kernel(x) {
        let flat = x.contiguous()?.reshape(((), inner))?;
        return super::tensor::linear(&flat, weight, bias)?.reshape(shape);
    }
    let kernel = Linear {
        rows: x.elem_count() / inner.max(1),
        inner,
        out,
        biased: bias.is_some(),
        shape: Shape::from(shape),
    };
    let bias = match bias {
        Some(bias) => bias.clone(),
        None => Tensor::zeros(out, x.dtype(), x.device())?,
    };
    apply3(kernel, [x, weight, &bias])
}

/// Rows that one task fills, and that are summed into one partial bias gradient; fixed, so that the sum does not depend on the
/// threads.
const BIAS_ROWS: usize = 256;

struct Linear {
    rows: usize,
    inner: usize,
    out: usize,
    biased: bool,
    shape: Shape,
}

impl Kernel<3> for Linear {
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
        [gx, gw, want_bias.then(|| sum_rows(grad, n))]
    }
}

/// Sums the rows of `x` `[rows, width]`: a bias's gradient.
pub(super) fn sum_rows<T: Real>(x: &[T], width: usize) -> Vec<T> {
    let mut total = vec![0f64; width];
    let mut part = vec![T::zero(); width];
    for rows in x.chunks(BIAS_ROWS * width) {
        part.fill(T::zero());
        add_rows(rows, &mut part);
        for (t, p) in total.iter_mut().zip(&part) {
            *t += (*p).to_f64();
        }
    }
    total.into_iter().map(real).collect()
}

/// Adds the rows of `x` to `total`.
#[pulp::with_simd(add_rows = pulp::Arch::new())]
#[inline(always)]
fn add_rows_on<S: pulp::Simd, T: Real>(_: S, x: &[T], total: &mut [T]) {
    for row in x.chunks_exact(total.len()) {
        for (t, &x) in total.iter_mut().zip(row) {
            *t += x;
        }
    }
}
