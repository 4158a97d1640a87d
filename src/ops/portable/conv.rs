//! [`ops::conv2d`](crate::ops::conv2d()) of candle's tensor operations: the input's gradient is a convolution too, the weight's
//! one matrix product for each tap of the kernel.
//!
//! candle's own backward computes the first as a transposed convolution and the second as a convolution with a kernel of the
//! image's size; on CUDA both are naive kernels. There this file is for builds without cuDNN, in which candle's forward is a
//! matrix product with sums in `f32`.

use candle_core::{Result, Tensor};

use super::{if_tracked, wide};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};
use crate::ops::bias_or_zeros;

/// As [`crate::ops::conv2d()`], which checks the shapes.
pub(in crate::ops) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let op = Conv2dOp {
        stride,
        padding,
        biased: bias.is_some(),
    };
    apply(op, [x, weight, &bias_or_zeros(bias, 1, x)?])
}

/// candle's convolution. On the CPU it has no `bf16`, and is slow in `f16`: both are computed in `f32` there.
fn convolve(x: &Tensor, weight: &Tensor, padding: usize, stride: usize) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    if !x.device().is_cpu() {
        return x.conv2d(&weight, padding, stride, 1, 1);
    }
    wide(&x)?
        .conv2d(&wide(&weight)?, padding, stride, 1, 1)?
        .to_dtype(x.dtype())
}

struct Conv2dOp {
    stride: usize,
    padding: usize,
    biased: bool,
}

impl Conv2dOp {
    /// The output gradient convolved with the kernels turned by 180 degrees. At a greater stride, zeros stand between the
    /// output gradient's pixels, which makes it what stride 1 would give.
    fn input_grad(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let (_, _, kh, kw) = weight.dims4()?;
        let (s, p) = (self.stride, self.padding);
        let grad = if s == 1 {
            grad.clone()
        } else {
            let (b, o, oh, ow) = grad.dims4()?;
            grad.reshape((b, o, oh, 1, ow, 1))?
                .pad_with_zeros(3, 0, s - 1)?
                .pad_with_zeros(5, 0, s - 1)?
                .reshape((b, o, oh * s, ow * s))?
                .narrow(2, 0, h + 2 * p + 1 - kh)?
                .narrow(3, 0, w + 2 * p + 1 - kw)?
        };
        let turned = weight.flip(&[2, 3])?.transpose(0, 1)?;
        if kh == kw && p < kh {
            return convolve(&grad, &turned, kh - 1 - p, 1);
        }
        // The gradient of the padded input, less the padding.
        let grad = grad
            .pad_with_zeros(2, kh - 1, kh - 1)?
            .pad_with_zeros(3, kw - 1, kw - 1)?;
        convolve(&grad, &turned, 0, 1)?
            .narrow(2, p, h)?
            .narrow(3, p, w)?
            .contiguous()
    }

    /// For each tap, the output gradient `[O, B·H'·W']` times the tap's pixels `[B·H'·W', C]`.
    fn weight_grad(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (o, c, kh, kw) = weight.dims4()?;
        let (s, p) = (self.stride, self.padding);
        let grad = grad.transpose(0, 1)?.contiguous()?.reshape((o, ()))?;
        let windows = x
            .transpose(0, 1)?
            .pad_with_zeros(2, p, p)?
            .pad_with_zeros(3, p, p)?
            .contiguous()?
            .unfold(2, kh, s)?
            .unfold(3, kw, s)?; // [C, B, H', W', kh, kw], a view
        let mut taps = Vec::with_capacity(kh * kw);
        for ky in 0..kh {
            for kx in 0..kw {
                let seen = windows.narrow(4, ky, 1)?.narrow(5, kx, 1)?;
                let seen = seen.contiguous()?.reshape((c, ()))?;
                taps.push(grad.matmul(&seen.t()?)?);
            }
        }
        Tensor::stack(&taps, 2)?.reshape((o, c, kh, kw))
    }
}

impl AutogradOp<3> for Conv2dOp {
    const NAME: &'static str = "conv2d";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = convolve(x, weight, self.padding, self.stride)?;
        if !self.biased {
            return Ok(y.into());
        }
        let rank = bias.rank();
        let bias = bias.unsqueeze(rank)?.unsqueeze(rank + 1)?;
        Ok(y.broadcast_add(&bias)?.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (pixels, kernels, grad) = (&x.detach(), &weight.detach(), &grad.contiguous()?);
        let bias_grad = || {
            let per_image = wide(grad)?.sum((2, 3))?;
            let sum = match bias.rank() {
                2 => per_image,
                _ => per_image.sum(0)?,
            };
            sum.to_dtype(bias.dtype())
        };
        Ok([
            if_tracked(x, || self.input_grad(pixels, kernels, grad))?,
            if_tracked(weight, || self.weight_grad(pixels, kernels, grad))?,
            if_tracked(bias, bias_grad)?,
        ])
    }
}
