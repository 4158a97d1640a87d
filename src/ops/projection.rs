//! Affine maps over channels that also turn a feature map into tokens or back: a transformer's first and last layers.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// A 1x1 convolution (`torch.nn.functional.conv2d`) whose result is laid out as tokens, one a pixel.
///
/// `x`: `[B, C, H, W]`, `weight`: `[O, C]` or `[O, C, 1, 1]`, `bias`: `[O]`, all of one float dtype → `[B, H·W, O]` in that
/// dtype.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn map_to_tokens(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check(x, x.dims4()?.1, weight, bias)?;
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::map_to_tokens(x, weight, bias);
    }
    if cpu::has_kernel(x) {
        cpu::map_to_tokens(x, weight, bias)
    } else {
        portable::map_to_tokens(x, weight, bias)
    }
}

/// A 1x1 convolution (`torch.nn.functional.conv2d`) of a feature map that is laid out as tokens, one a pixel.
///
/// `x`: `[B, H·W, C]`, `weight`: `[O, C]` or `[O, C, 1, 1]`, `bias`: `[O]`, all of one float dtype, `size`: H and W →
/// `[B, O, H, W]` in that dtype.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn tokens_to_map(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    size: (usize, usize),
) -> Result<Tensor> {
    let (_, pixels, channels) = x.dims3()?;
    check(x, channels, weight, bias)?;
    if pixels != size.0 * size.1 {
        candle_core::bail!("tokens_to_map: x is {:?} but the map {size:?}", x.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::tokens_to_map(x, weight, bias, size);
    }
    if cpu::has_kernel(x) {
        cpu::tokens_to_map(x, weight, bias, size)
    } else {
        portable::tokens_to_map(x, weight, bias, size)
    }
}

/// Fails unless `weight` and `bias` are those of a projection of `channels`.
fn check(x: &Tensor, channels: usize, weight: &Tensor, bias: &Tensor) -> Result<()> {
    match weight.dims() {
        [o, c] | [o, c, 1, 1] if *c == channels && bias.dims() == [*o] => Ok(()),
        dims => candle_core::bail!(
            "a projection of {:?}: weight is {dims:?}, bias {:?}",
            x.dims(),
            bias.dims()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::conv2d;
    use crate::ops::gradcheck::{assert_close, check_gradients, random};

    #[test]
    fn projections_equal_1x1_convolutions() -> Result<()> {
        let (x, bias) = (random(&[2, 5, 3, 4], 1)?, random(&[40], 3)?);
        let weight = random(&[40, 5, 1, 1], 2)?;
        let want = conv2d(&x, &weight, Some(&bias), 1, 0)?;
        let tokens = map_to_tokens(&x, &weight, &bias)?;
        let want_tokens = want.flatten_from(2)?.transpose(1, 2)?;
        assert_close(&tokens, &want_tokens.contiguous()?, 1e-12)?;
        let x = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let weight = weight.reshape((40, 5))?;
        assert_close(&tokens_to_map(&x, &weight, &bias, (3, 4))?, &want, 1e-12)
    }

    #[test]
    fn projection_gradients_match_finite_differences() -> Result<()> {
        for batch in [1, 3] {
            let (weight, bias) = (random(&[5, 3, 1, 1], 2)?, random(&[5], 3)?);
            let inputs = [random(&[batch, 3, 2, 4], 1)?, weight.clone(), bias.clone()];
            check_gradients(&inputs, |t| map_to_tokens(&t[0], &t[1], &t[2]))?;
            let inputs = [random(&[batch, 8, 3], 1)?, weight, bias];
            check_gradients(&inputs, |t| tokens_to_map(&t[0], &t[1], &t[2], (2, 4)))?;
        }
        Ok(())
    }
}
