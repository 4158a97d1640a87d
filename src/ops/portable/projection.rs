//! [`ops::map_to_tokens`](crate::ops::map_to_tokens()) and [`ops::tokens_to_map`](crate::ops::tokens_to_map()) of candle's tensor
//! operations.

use candle_core::{Result, Tensor};

use super::linear::linear;

/// As [`crate::ops::map_to_tokens()`], which checks the shapes.
pub(in crate::ops) fn map_to_tokens(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let tokens = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
    let flat = tokens.reshape((b * h * w, c))?;
    linear(&flat, &weight.flatten_from(1)?, Some(bias))?.reshape((b, h * w, ()))
}

/// As [`crate::ops::tokens_to_map()`], which checks the shapes.
pub(in crate::ops) fn tokens_to_map(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    (h, w): (usize, usize),
) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    let flat = x.contiguous()?.reshape((b * n, c))?;
    let tokens = linear(&flat, &weight.flatten_from(1)?, Some(bias))?.reshape((b, n, ()))?;
    tokens.transpose(1, 2)?.contiguous()?.reshape((b, (), h, w))
}
