//! [`ops::linear`](crate::ops::linear()) by cuBLAS: one product, and a kernel that adds the bias in place.

use candle_core::{D, Result, Shape, Tensor};

use super::bias::{add_bias, bias_grad};
use super::gpu::{Arg, Output};
use super::matmul::matmul;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply, if_tracked};

/// As [`crate::ops::linear()`], which checks the shapes and gives that of the result. The bias may be in `f32`.
pub(in crate::ops) fn linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    shape: Shape,
) -> Result<Tensor> {
    let (x, weight) = (&x.contiguous()?, &weight.contiguous()?);
    let op = Linear { shape };
    match bias {
        Some(bias) => apply(op, [x, weight, &bias.contiguous()?]),
        None => apply(op, [x, weight]),
    }
}

struct Linear {
    /// Of the result.
    shape: Shape,
}

impl Linear {
    /// The result without a bias.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Output> {
        matmul(&rows(x)?, &weight.t()?, self.shape.clone())
    }

    /// The gradients of `x` and `weight`. `grad`: contiguous.
    fn gradients(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let grad = &rows(grad)?;
        let x_grad = || Ok(matmul(grad, &weight.detach(), x.shape())?.into_tensor());
        let weight_grad =
            || Ok(matmul(&grad.t()?, &rows(&x.detach())?, weight.shape())?.into_tensor());
        Ok([if_tracked(x, x_grad)?, if_tracked(weight, weight_grad)?])
    }
}

/// A contiguous tensor as a matrix, with a row for each vector of the last dimension.
fn rows(x: &Tensor) -> Result<Tensor> {
    x.reshape(((), x.dim(D::Minus1)?))
}

impl AutogradOp<2> for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, weight]: [&Tensor; 2]) -> Result<OpResult> {
        Ok(self.product(x, weight)?.into())
    }

    fn backward(&self, [x, weight]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        self.gradients(x, weight, &grad.contiguous()?)
    }
}

impl AutogradOp<3> for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = self.product(x, weight)?;
        let (out, count) = (weight.dim(0)?, self.shape.elem_count());
        add_bias(Arg::Output(&y), x.dtype(), [count / out, out, 1], bias)?;
        Ok(y.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = &grad.contiguous()?;
        let [x_grad, weight_grad] = self.gradients(x, weight, grad)?;
        let (out, count) = (weight.dim(0)?, self.shape.elem_count());
        let sums = || bias_grad(grad, [count / out, out, 1], bias);
        Ok([x_grad, weight_grad, if_tracked(bias, sums)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_linear_equals_the_cpu() -> Result<()> {
        for (shape, out) in [(&[2, 3, 8][..], 5), (&[7, 1], 16), (&[1, 24], 1)] {
            let inner = shape[shape.len() - 1];
            let shape_of = |x: &Tensor| {
                let mut shape = x.dims().to_vec();
                shape[x.rank() - 1] = out;
                Shape::from(shape)
            };
            let mut inputs = vec![random(shape, 1)?, random(&[out, inner], 2)?];
            check(
                &inputs,
                &|t| linear(&t[0], &t[1], None, shape_of(&t[0])),
                &|t| crate::ops::linear(&t[0], &t[1], None),
            )?;
            inputs.push(random(&[out], 3)?);
            check(
                &inputs,
                &|t| linear(&t[0], &t[1], Some(&t[2]), shape_of(&t[0])),
                &|t| crate::ops::linear(&t[0], &t[1], Some(&t[2])),
            )?;
        }
        Ok(())
    }
}
