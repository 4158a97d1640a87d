//! [`ops::linear`](crate::ops::linear()) of candle's tensor operations.

use candle_core::{Result, Tensor};

use super::{if_tracked, wide};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};
use crate::ops::bias_or_zeros;

/// As [`crate::ops::linear()`], which checks the shapes, for `x` `[N, in]`.
pub(in crate::ops) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = LinearOp {
        biased: bias.is_some(),
    };
    apply(op, [x, weight, &bias_or_zeros(bias, 1, x)?])
}

struct LinearOp {
    biased: bool,
}

impl AutogradOp<3> for LinearOp {
    const NAME: &'static str = "linear";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = x.matmul(&weight.t()?)?;
        if self.biased {
            Ok(y.broadcast_add(bias)?.into())
        } else {
            Ok(y.into())
        }
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = grad.contiguous()?;
        Ok([
            if_tracked(x, || grad.matmul(&weight.detach()))?,
            if_tracked(weight, || grad.t()?.matmul(&x.detach()))?,
            if_tracked(bias, || wide(&grad)?.sum(0)?.to_dtype(bias.dtype()))?,
        ])
    }
}
