//! Activations that are not fused with another operation.

use candle_core::{D, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// The first half of the last dimension times the exact GELU of the second, as diffusers' `GEGLU`.
///
/// `x`: `[…, 2·C]` of a float dtype → `[…, C]` in that dtype.
///
/// # Errors
/// When the last dimension is odd.
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    if !x.dim(D::Minus1)?.is_multiple_of(2) {
        candle_core::bail!("geglu: the last dimension of {:?} is odd", x.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::geglu(x);
    }
    if cpu::has_kernel(x) {
        cpu::geglu(x)
    } else {
        portable::geglu(x)
    }
}

/// `x·σ(1.702·x)`, an approximate GELU, as transformers' `QuickGELUActivation`: of the shape and dtype of `x`.
///
/// # Errors
/// When `x` is not of a float dtype.
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::quick_gelu(x);
    }
    if cpu::has_kernel(x) {
        cpu::quick_gelu(x)
    } else {
        portable::quick_gelu(x)
    }
}

/// SiLU, `x·σ(x)`, of the shape and dtype of `x`.
///
/// # Errors
/// When `x` is not of a float dtype.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::silu(x);
    }
    x.silu()
}

/// The exact GELU, `x·Φ(x)`, of the shape and dtype of `x`.
///
/// # Errors
/// When `x` is not of a float dtype.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::gelu(x);
    }
    x.gelu_erf()
}

/// The factor in the quick GELU.
pub(super) const QUICK: f64 = 1.702;
