//! Nearest-neighbour upsampling.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// Doubles height and width by repeating pixels, as `torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")`.
///
/// `x`: `[B, C, H, W]` of a float dtype → `[B, C, 2H, 2W]` in that dtype. candle's own upsampling overwrites its gradient
/// instead of adding to it.
///
/// # Errors
/// When `x` is not of rank 4.
pub fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::upsample_nearest_2x(x);
    }
    if cpu::has_kernel(x) {
        cpu::upsample_nearest_2x(x)
    } else {
        portable::upsample_nearest_2x(x)
    }
}
