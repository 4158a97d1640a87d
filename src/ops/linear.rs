//! Affine maps over the last dimension.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// `x · weightᵀ + bias` over the last dimension, as `torch.nn.functional.linear`.
///
/// `x`: `[…, in]`, `weight`: `[out, in]`, `bias`: `[out]` or none, all of one float dtype → `[…, out]` in that dtype.
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
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::linear(x, weight, bias, shape.into());
    }
    if cpu::has_kernel(x) {
        return cpu::linear(x, weight, bias, shape.into());
    }
    let flat = x.contiguous()?.reshape(((), inner))?;
    portable::linear(&flat, weight, bias)?.reshape(shape)
}
