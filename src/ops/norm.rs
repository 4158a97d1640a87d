//! Group and layer normalisation.

use candle_core::{D, Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// Group normalisation over channels and space, as `torch.nn.functional.group_norm`; with `silu`, followed by SiLU, as in
/// every residual block.
///
/// `x`: `[B, C, …]` of a float dtype, `weight` and `bias`: `[C]` in that dtype, or `f32` beside 16-bit numbers → the shape and
/// dtype of `x`.
///
/// # Errors
/// When `groups` does not divide the channels or the shapes do not fit together.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let c = x.dim(1)?;
    if groups == 0 || !c.is_multiple_of(groups) || weight.dims() != [c] || bias.dims() != [c] {
        candle_core::bail!(
            "group_norm: x is {:?}, weight {:?}, {groups} groups",
            x.dims(),
            weight.dims()
        );
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::group_norm(x, weight, bias, groups, eps, silu);
    }
    if cpu::has_kernel(x) {
        cpu::group_norm(x, weight, bias, groups, eps, silu)
    } else {
        portable::group_norm(x, weight, bias, groups, eps, silu)
    }
}

/// Layer normalisation over the last dimension, as `torch.nn.functional.layer_norm`.
///
/// `x`: `[…, C]` of a float dtype, `weight` and `bias`: `[C]` in that dtype, or `f32` beside 16-bit numbers → the shape and
/// dtype of `x`.
///
/// # Errors
/// When the shapes do not fit together.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let c = x.dim(D::Minus1)?;
    if weight.dims() != [c] || bias.dims() != [c] {
        candle_core::bail!(
            "layer_norm: x is {:?}, weight {:?}",
            x.dims(),
            weight.dims()
        );
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::layer_norm(x, weight, bias, eps);
    }
    if cpu::has_kernel(x) {
        cpu::layer_norm(x, weight, bias, eps)
    } else {
        portable::layer_norm(x, weight, bias, eps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{check_gradients, random};

    #[test]
    fn group_norm_gradients_match_finite_differences() -> Result<()> {
        for (shape, groups) in [(&[2, 6, 3, 4][..], 3), (&[3, 4, 5][..], 1)] {
            let c = shape[1];
            for silu in [false, true] {
                let inputs = [random(shape, 1)?, random(&[c], 2)?, random(&[c], 3)?];
                check_gradients(&inputs, |t| {
                    group_norm(&t[0], &t[1], &t[2], groups, 1e-5, silu)
                })?;
            }
        }
        Ok(())
    }

    #[test]
    fn layer_norm_gradients_match_finite_differences() -> Result<()> {
        let inputs = [random(&[2, 67, 5], 1)?, random(&[5], 2)?, random(&[5], 3)?];
        check_gradients(&inputs, |t| layer_norm(&t[0], &t[1], &t[2], 1e-5))
    }
}
