//! Affine maps over the last dimension.

use candle_core::{Result, Tensor};

use super::wide;
use crate::ops::computed::{TensorOp, apply3};

/// As [`crate::ops::linear()`], which checks the shapes, for `x` `[N, in]`.
pub(in crate::ops) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = Linear {
        biased: bias.is_some(),
    };
    match bias {
        Some(bias) => apply3(op, x, weight, bias),
        None => apply3(op, x, weight, &Tensor::zeros(1, x.dtype(), x.device())?),
    }
}

struct Linear {
    biased: bool,
}

impl TensorOp<3> for Linear {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
        let y = x.matmul(&weight.t()?)?;
        match self.biased {
            true => y.broadcast_add(bias),
            false => Ok(y),
        }
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (gx, gw, gb) = (x.track_op(), weight.track_op(), bias.track_op());
        let [x, weight, grad] = [&x.detach(), &weight.detach(), &grad.contiguous()?];
        Ok([
            gx.then(|| grad.matmul(weight)).transpose()?,
            gw.then(|| grad.t()?.matmul(x)).transpose()?,
            gb.then(|| wide(grad)?.sum(0)?.to_dtype(bias.dtype()))
                .transpose()?,
        ])
    }
}
