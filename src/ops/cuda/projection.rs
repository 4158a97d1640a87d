//! [`ops::map_to_tokens`](crate::ops::map_to_tokens()), [`ops::tokens_to_map`](crate::ops::tokens_to_map()) and convolutions with a
//! kernel of one pixel, by cuBLAS: one batched product, which reads an operand transposed where the layouts differ.

use candle_core::{Result, Shape, Tensor};

use super::bias::{add_bias, bias_grad};
use super::gpu::{Arg, Output};
use super::matmul::matmul;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply, if_tracked};

/// As [`crate::ops::map_to_tokens()`], which checks the shapes. The bias may be in `f32`.
pub(in crate::ops) fn map_to_tokens(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (batch, _, h, w) = x.dims4()?;
    let op = Projection {
        from: PixelLayout::Map,
        to: PixelLayout::Tokens,
        shape: Shape::from((batch, h * w, weight.dim(0)?)),
    };
    op.apply(x, weight, Some(bias))
}

/// As [`crate::ops::tokens_to_map()`], which checks the shapes. The bias may be in `f32`.
pub(in crate::ops) fn tokens_to_map(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    (h, w): (usize, usize),
) -> Result<Tensor> {
    let op = Projection {
        from: PixelLayout::Tokens,
        to: PixelLayout::Map,
        shape: Shape::from((x.dim(0)?, weight.dim(0)?, h, w)),
    };
    op.apply(x, weight, Some(bias))
}

/// As [`crate::ops::conv2d()`] with a kernel of one pixel, stride 1 and no padding.
pub(super) fn pointwise(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (batch, _, h, w) = x.dims4()?;
    let op = Projection {
        from: PixelLayout::Map,
        to: PixelLayout::Map,
        shape: Shape::from((batch, weight.dim(0)?, h, w)),
    };
    op.apply(x, weight, bias)
}

/// How the channels and pixels of an image are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PixelLayout {
    /// `[channels, pixels]`.
    Map,
    /// `[pixels, channels]`.
    Tokens,
}

impl PixelLayout {
    /// A contiguous batch of this layout as `[B, pixels, channels]`.
    fn tokens(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Map => x.flatten_from(2)?.transpose(1, 2),
            Self::Tokens => Ok(x.clone()),
        }
    }

    /// A contiguous batch of this layout as `[B, channels, pixels]`.
    fn map(self, x: &Tensor) -> Result<Tensor> {
        self.tokens(x)?.transpose(1, 2)
    }
}

struct Projection {
    from: PixelLayout,
    to: PixelLayout,
    /// Of the result.
    shape: Shape,
}

impl Projection {
    fn apply(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (x, weight) = (&x.contiguous()?, &weight.contiguous()?);
        match bias {
            Some(bias) => apply(self, [x, weight, &bias.contiguous()?]),
            None => apply(self, [x, weight]),
        }
    }

    /// The result without a bias.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Output> {
        let weight = weight.flatten_from(1)?;
        let shape = self.shape.clone();
        let batch = x.dim(0)?;
        match self.to {
            PixelLayout::Map => matmul(&weight.broadcast_left(batch)?, &self.from.map(x)?, shape),
            PixelLayout::Tokens => {
                let weight = weight.t()?.broadcast_left(batch)?;
                matmul(&self.from.tokens(x)?, &weight, shape)
            }
        }
    }

    /// The gradients of `x` and `weight`. `grad`: contiguous.
    fn gradients(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let x_grad = || {
            let weight = weight.detach().flatten_from(1)?;
            let batch = x.dim(0)?;
            let gradient = match self.from {
                PixelLayout::Map => {
                    let weight = weight.t()?.broadcast_left(batch)?;
                    matmul(&weight, &self.to.map(grad)?, x.shape())?
                }
                PixelLayout::Tokens => {
                    let weight = weight.broadcast_left(batch)?;
                    matmul(&self.to.tokens(grad)?, &weight, x.shape())?
                }
            };
            Ok(gradient.into_tensor())
        };
        let weight_grad = || self.weight_grad(&x.detach(), weight, grad);
        Ok([if_tracked(x, x_grad)?, if_tracked(weight, weight_grad)?])
    }

    /// A product for each image, and their sum.
    fn weight_grad(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (grad, x) = (self.to.map(grad)?, self.from.tokens(x)?);
        let (batch, count) = (x.dim(0)?, weight.elem_count());
        if batch == 1 {
            return Ok(matmul(&grad, &x, weight.shape())?.into_tensor());
        }
        let each = matmul(&grad, &x, (batch, count))?.into_tensor();
        // The sums over rows that the gradient of a bias is.
        bias_grad(&each, [batch, count, 1], weight)
    }

    /// The result's images, channels and what a bias is added to in each, as [`add_bias`] takes them.
    fn sizes(&self, weight: &Tensor) -> Result<[usize; 3]> {
        let (channels, count) = (weight.dim(0)?, self.shape.elem_count());
        let outer = match self.to {
            PixelLayout::Map => self.shape.dims()[0],
            PixelLayout::Tokens => count / channels,
        };
        Ok([outer, channels, count / (outer * channels)])
    }
}

impl AutogradOp<2> for Projection {
    const NAME: &'static str = "projection";

    fn forward(&self, [x, weight]: [&Tensor; 2]) -> Result<OpResult> {
        Ok(self.product(x, weight)?.into())
    }

    fn backward(&self, [x, weight]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        self.gradients(x, weight, &grad.contiguous()?)
    }
}

impl AutogradOp<3> for Projection {
    const NAME: &'static str = "projection";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = self.product(x, weight)?;
        add_bias(Arg::Output(&y), x.dtype(), self.sizes(weight)?, bias)?;
        Ok(y.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = &grad.contiguous()?;
        let [x_grad, weight_grad] = self.gradients(x, weight, grad)?;
        let sums = || bias_grad(grad, self.sizes(weight)?, bias);
        Ok([x_grad, weight_grad, if_tracked(bias, sums)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_projections_equal_the_cpu() -> Result<()> {
        for batch in [1, 3] {
            for [inputs, outputs] in [[3, 5], [8, 16], [1, 4], [6, 1]] {
                let (weight, bias) = (random(&[outputs, inputs, 1, 1], 2)?, random(&[outputs], 3)?);
                let x = random(&[batch, inputs, 2, 4], 1)?;
                check(
                    &[x, weight.clone(), bias.clone()],
                    &|t| map_to_tokens(&t[0], &t[1], &t[2]),
                    &|t| ops::map_to_tokens(&t[0], &t[1], &t[2]),
                )?;
                let x = random(&[batch, 8, inputs], 1)?;
                check(
                    &[x, weight.flatten_from(1)?, bias],
                    &|t| tokens_to_map(&t[0], &t[1], &t[2], (2, 4)),
                    &|t| ops::tokens_to_map(&t[0], &t[1], &t[2], (2, 4)),
                )?;
            }
        }
        Ok(())
    }
}
