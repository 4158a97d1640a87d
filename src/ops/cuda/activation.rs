//! [`ops::geglu`](crate::ops::geglu()) by kernels.

use candle_core::{D, Result, Tensor};

use super::gpu::{Arg, Launch, Module, Output, empty_like, launch, module};
use crate::ops::autograd_op::{OpResult, TensorOp, apply_tensor_op1};

const MODULE: Module = module!("activation");

/// As [`crate::ops::geglu()`], which checks the shape.
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    apply_tensor_op1(Geglu, &x.contiguous()?)
}

struct Geglu;

impl TensorOp<1> for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let width = x.dim(D::Minus1)? / 2;
        let rows = x.elem_count() / (2 * width);
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = width;
        let out = Output::new(shape, x.dtype(), x.device())?;
        let kernel = Launch::elementwise(MODULE, "geglu_forward", x.dtype(), rows * width);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Output(&out),
                Arg::long(rows),
                Arg::int(width)?,
            ],
        )?;
        Ok(out.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let width = x.dim(D::Minus1)? / 2;
        let rows = x.elem_count() / (2 * width);
        let (grad, x_grad) = (grad.contiguous()?, empty_like(x)?);
        let kernel = Launch::elementwise(MODULE, "geglu_backward", x.dtype(), rows * width);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Tensor(&grad),
                Arg::Tensor(&x_grad),
                Arg::long(rows),
                Arg::int(width)?,
            ],
        )?;
        Ok([Some(x_grad)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_geglu_equals_the_cpu() -> Result<()> {
        for shape in [&[2, 3, 6][..], &[5, 130]] {
            let reference = |t: &[Tensor]| crate::ops::geglu(&t[0]);
            check(&[random(shape, 1)?], &|t| geglu(&t[0]), &reference)?;
        }
        Ok(())
    }
}
