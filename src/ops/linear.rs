//! Affine maps over the last dimension.

use candle_core::{Result, Shape, Tensor};

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
    let flat = x.contiguous()?.reshape(((), inner))?;
    let y = if has_kernel(x) {
        let bias = match bias {
            Some(bias) => bias.clone(),
            None => Tensor::zeros(out, x.dtype(), x.device())?,
        };
        let kernel = Linear {
            rows: flat.dim(0)?,
            inner,
            out,
        };
        apply3(kernel, [&flat, weight, &bias])?
    } else {
        super::tensor::linear(&flat, weight, bias)?
    };
    y.reshape(shape)
}

/// Rows of the input summed into one partial bias gradient; fixed, so that the sum does not depend on the threads.
const BIAS_ROWS: usize = 256;

struct Linear {
    rows: usize,
    inner: usize,
    out: usize,
}

impl Kernel<3> for Linear {
    const NAME: &'static str = "linear";

    fn shape(&self) -> Shape {
        Shape::from((self.rows, self.out))
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let (m, k, n) = (self.rows, self.inner, self.out);
        let mut y = Vec::with_capacity(m * n);
        for _ in 0..m {
            y.extend_from_slice(bias);
        }
        let (x, weight) = (Mat::new(x, m, k, k), Mat::new(weight, n, k, k));
        let dst = MatMut::new(&mut y, m, n, n);
        gemm(dst, true, T::one(), x, weight.t(), Threads::Pool);
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
        let gb = want_bias.then(|| {
            let mut total = vec![0f64; n];
            let mut part = vec![T::zero(); n];
            for rows in grad.chunks(BIAS_ROWS * n) {
                part.fill(T::zero());
                add_rows(rows, &mut part);
                for (t, p) in total.iter_mut().zip(&part) {
                    *t += (*p).to_f64();
                }
            }
            total.into_iter().map(real).collect()
        });
        [gx, gw, gb]
    }
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
