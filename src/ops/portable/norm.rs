//! [`ops::group_norm`](crate::ops::group_norm()) and [`ops::layer_norm`](crate::ops::layer_norm()) of candle's tensor operations,
//! in `f32` for 16-bit operands.

use candle_core::{D, Result, Tensor};

use super::{if_tracked, wide};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

/// As [`crate::ops::group_norm()`], which checks the shapes.
pub(in crate::ops) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    apply(GroupNormOp { groups, eps, silu }, [x, weight, bias])
}

/// As [`crate::ops::layer_norm()`], which checks the shapes: group normalisation with one pixel and one group.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let rows = x.reshape(((), x.dim(D::Minus1)?, 1))?;
    group_norm(&rows, weight, bias, 1, eps, false)?.reshape(x.shape())
}

struct GroupNormOp {
    groups: usize,
    eps: f64,
    silu: bool,
}

/// The values that forward and backward both compute.
struct Normalised {
    /// `[B, C, pixels]`, with mean 0 and variance 1 in each group.
    xhat: Tensor,
    /// Reciprocal standard deviation, `[B·groups, 1]`.
    rstd: Tensor,
    /// `xhat · weight + bias`, `[B, C, pixels]`.
    y: Tensor,
}

impl GroupNormOp {
    fn normalise(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Normalised> {
        let (b, c) = (x.dim(0)?, x.dim(1)?);
        let rows = wide(x)?.reshape((b * self.groups, ()))?;
        let centred = rows.broadcast_sub(&rows.mean_keepdim(1)?)?;
        let rstd = (centred.sqr()?.mean_keepdim(1)? + self.eps)?
            .sqrt()?
            .recip()?;
        let xhat = centred.broadcast_mul(&rstd)?.reshape((b, c, ()))?;
        let y = xhat
            .broadcast_mul(&per_channel(weight)?)?
            .broadcast_add(&per_channel(bias)?)?;
        Ok(Normalised { xhat, rstd, y })
    }
}

/// `[C]` → `[1, C, 1]`, wide.
fn per_channel(x: &Tensor) -> Result<Tensor> {
    wide(x)?.reshape((1, (), 1))
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

impl AutogradOp<3> for GroupNormOp {
    const NAME: &'static str = "group_norm";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = self.normalise(x, weight, bias)?.y;
        let y = if self.silu { y.silu()? } else { y };
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (w, b) = (&weight.detach(), &bias.detach());
        let Normalised { xhat, rstd, y } = self.normalise(&x.detach(), w, b)?;
        let grad = wide(grad)?.reshape(y.shape())?;
        let grad = if self.silu {
            let s = sigmoid(&y)?;
            let slope = (&s * ((&y * (1.0 - &s)?)? + 1.0)?)?;
            (grad * slope)?
        } else {
            grad
        };
        let input_grad = || {
            let rows = (rstd.dim(0)?, ());
            let grad = grad.broadcast_mul(&per_channel(w)?)?.reshape(rows)?;
            let xhat = xhat.reshape(rows)?;
            let against = xhat.broadcast_mul(&(&grad * &xhat)?.mean_keepdim(1)?)?;
            grad.broadcast_sub(&grad.mean_keepdim(1)?)?
                .sub(&against)?
                .broadcast_mul(&rstd)?
                .reshape(x.shape())?
                .to_dtype(x.dtype())
        };
        let weight_grad = || (&grad * &xhat)?.sum((0, 2))?.to_dtype(weight.dtype());
        let bias_grad = || grad.sum((0, 2))?.to_dtype(bias.dtype());
        Ok([
            if_tracked(x, input_grad)?,
            if_tracked(weight, weight_grad)?,
            if_tracked(bias, bias_grad)?,
        ])
    }
}
