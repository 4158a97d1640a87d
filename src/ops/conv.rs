//! 2-d convolution.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};
pub use cpu::convolves_alike;

/// 2-d cross-correlation with zero padding, as `torch.nn.functional.conv2d` with one group and no dilation.
///
/// `x`: `[B, C, H, W]`, `weight`: `[O, C, kh, kw]`, `bias`: `[O]`, or `[B, O]` with one for each image, or none, all of one
/// float dtype → `[B, O, H', W']` in that dtype.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let (batch, c, h, w) = x.dims4()?;
    let (o, wc, kh, kw) = weight.dims4()?;
    let fits = |bias: &Tensor| bias.dims() == [o] || bias.dims() == [batch, o];
    if !bias.is_none_or(fits)
        || c != wc
        || h + 2 * padding < kh
        || w + 2 * padding < kw
        || stride == 0
    {
        candle_core::bail!(
            "conv2d: x is {:?} but weight is {:?}, bias {:?}",
            x.dims(),
            weight.dims(),
            bias.map(Tensor::dims)
        );
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) {
        return cuda::conv2d(x, weight, bias, stride, padding);
    }
    if cpu::has_kernel(x) {
        cpu::conv2d(x, weight, bias, stride, padding)
    } else {
        portable::conv2d(x, weight, bias, stride, padding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, check_gradients, random};

    #[test]
    fn conv2d_equals_that_of_candle() -> Result<()> {
        for (b, c, o, h, w, k, stride, pad) in [
            (2, 3, 5, 7, 6, 3, 1, 1),
            (1, 4, 2, 8, 8, 3, 2, 1),
            (3, 2, 4, 5, 9, 1, 1, 0),
            (1, 2, 3, 9, 7, 3, 2, 0),
            (2, 2, 2, 6, 6, 5, 1, 2),
        ] {
            let x = random(&[b, c, h, w], 1)?;
            let weight = random(&[o, c, k, k], 2)?;
            let bias = random(&[o], 3)?;
            let want = x
                .conv2d(&weight, pad, stride, 1, 1)?
                .broadcast_add(&bias.reshape((1, o, 1, 1))?)?;
            assert_close(
                &conv2d(&x, &weight, Some(&bias), stride, pad)?,
                &want,
                1e-12,
            )?;
        }
        Ok(())
    }

    #[test]
    fn conv2d_gradients_match_finite_differences() -> Result<()> {
        for (stride, pad, k) in [(1, 1, 3), (2, 1, 3), (1, 0, 1), (1, 0, 3), (2, 0, 3)] {
            let inputs = [
                random(&[2, 3, 5, 6], 1)?,
                random(&[4, 3, k, k], 2)?,
                random(&[4], 3)?,
            ];
            check_gradients(&inputs, |t| conv2d(&t[0], &t[1], Some(&t[2]), stride, pad))?;
        }
        Ok(())
    }
}
