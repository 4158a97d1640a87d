//! [`ops::upsample_nearest_2x`](crate::ops::upsample_nearest_2x()) of candle's tensor operations.

use candle_core::{Result, Tensor};

use super::wide;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

/// As [`crate::ops::upsample_nearest_2x()`].
pub(in crate::ops) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    apply(UpsampleOp, [x])
}

struct UpsampleOp;

impl AutogradOp<1> for UpsampleOp {
    const NAME: &'static str = "upsample_nearest_2x";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let (b, c, h, w) = x.dims4()?;
        let y = x
            .reshape((b * c, h, 1, w, 1))?
            .broadcast_as((b * c, h, 2, w, 2))?
            .contiguous()?
            .reshape((b, c, 2 * h, 2 * w))?;
        Ok(y.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let (b, c, h, w) = x.dims4()?;
        let grad = wide(grad)?
            .reshape((b * c, h, 2, w, 2))?
            .sum((2, 4))?
            .reshape(x.shape())?;
        Ok([Some(grad.to_dtype(x.dtype())?)])
    }
}
