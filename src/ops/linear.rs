//! Affine maps over the last dimension.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::cpu::{Grads3, Real, View, by_dtype, has_kernel, needs_grad, real, slice};
use super::gemm::{Mat, MatMut, Threads, gemm};

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
            Some(bias) => bias.contiguous()?,
            None => Tensor::zeros(out, x.dtype(), x.device())?,
        };
        flat.apply_op3(&weight.contiguous()?, &bias, Linear)?
    } else {
        super::tensor::linear(&flat, weight, bias)?
    };
    y.reshape(shape)
}

/// Rows of the input summed into one partial bias gradient; fixed, so that the sum does not depend on the threads.
const BIAS_ROWS: usize = 256;

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(x: &[T], w: &[T], b: &[T], (m, k, n): (usize, usize, usize)) -> CpuStorage {
            let mut y = Vec::with_capacity(m * n);
            for _ in 0..m {
                y.extend_from_slice(b);
            }
            let (x, w) = (Mat::new(x, m, k, k), Mat::new(w, n, k, k));
            gemm(
                MatMut::new(&mut y, m, n, n),
                true,
                T::one(),
                x,
                w.t(),
                Threads::Pool,
            );
            T::to_cpu_storage_owned(y)
        }
        fn typed<T: Real>(
            s: [(&CpuStorage, &Layout); 3],
            dims: (usize, usize, usize),
        ) -> Result<CpuStorage> {
            let [x, w, b] = s.map(|(s, l)| slice::<T>(s, l));
            Ok(run(x?, w?, b?, dims))
        }
        let (m, k) = xl.shape().dims2()?;
        let n = wl.shape().dims2()?.0;
        let operands = [(x, xl), (w, wl), (b, bl)];
        let y = by_dtype!(
            candle_core::backend::BackendStorage::dtype(x),
            self.name(),
            typed(operands, (m, k, n))
        )?;
        Ok((y, Shape::from((m, n))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<Grads3> {
        by_dtype!(
            x.dtype(),
            self.name(),
            backward(x, w, b, &grad.contiguous()?)
        )
    }
}

fn backward<T: Real>(x: &Tensor, w: &Tensor, b: &Tensor, grad: &Tensor) -> Result<Grads3> {
    let (m, k) = x.dims2()?;
    let n = w.dim(0)?;
    let (xv, wv, gv) = (View::of(x), View::of(w), View::of(grad));
    let (xs, ws, gs) = (xv.slice::<T>()?, wv.slice::<T>()?, gv.slice::<T>()?);
    let g = Mat::new(gs, m, n, n);
    let device = x.device();
    let gx = if needs_grad(x) {
        let mut out = vec![T::zero(); m * k];
        let w = Mat::new(ws, n, k, k);
        gemm(
            MatMut::new(&mut out, m, k, k),
            false,
            T::one(),
            g,
            w,
            Threads::Pool,
        );
        Some(Tensor::from_vec(out, (m, k), device)?)
    } else {
        None
    };
    let gw = if needs_grad(w) {
        let mut out = vec![T::zero(); n * k];
        let x = Mat::new(xs, m, k, k);
        gemm(
            MatMut::new(&mut out, n, k, k),
            false,
            T::one(),
            g.t(),
            x,
            Threads::Pool,
        );
        Some(Tensor::from_vec(out, (n, k), device)?)
    } else {
        None
    };
    let gb = if needs_grad(b) {
        let mut total = vec![0f64; n];
        for rows in gs.chunks(BIAS_ROWS * n) {
            let mut part = vec![T::zero(); n];
            for row in rows.chunks_exact(n) {
                for (p, &g) in part.iter_mut().zip(row) {
                    *p += g;
                }
            }
            for (t, p) in total.iter_mut().zip(&part) {
                *t += (*p).to_f64();
            }
        }
        let total: Vec<T> = total.into_iter().map(real).collect();
        Some(Tensor::from_vec(total, n, device)?)
    } else {
        None
    };
    Ok((gx, gw, gb))
}
