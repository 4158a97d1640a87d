//! 2-d convolution, forward and backward.

mod patches;
mod winograd;

use candle_core::{Result, Shape, Tensor};

use super::cpu::Real;
use super::kernel::{Kernel, apply3, has_kernel};
use super::projection::sum_planes;

/// 2-d cross-correlation with zero padding, as `torch.nn.functional.conv2d` with one group and no dilation.
///
/// `x`: `[B, C, H, W]`, `weight`: `[O, C, kh, kw]`, `bias`: `[O]`, or `[B, O]` with one for each image, or none →
/// `[B, O, H', W']`.
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
    if has_kernel(x) {
        let bias = match bias {
            Some(bias) => bias.clone(),
            None => Tensor::zeros(o, x.dtype(), x.device())?,
        };
        let geometry = Geometry {
            c,
            h,
            w,
            o,
            kh,
            kw,
            stride,
            pad_h: padding,
            pad_w: padding,
        };
        let kernel = Conv2d {
            batch,
            bias_per_image: bias.rank() == 2,
            geometry,
        };
        return apply3(kernel, [x, weight, &bias]);
    }
    super::tensor::conv2d(x, weight, bias, stride, padding)
}

/// Whether images of at most `channels` and at least `side` pixels are convolved in a batch as each would be alone, to the bit,
/// on the CPU. A batch of very small ones may be worth another way than one of them.
#[must_use]
pub fn convolves_alike(channels: usize, side: usize) -> bool {
    winograd::tiles(side, side) >= winograd::enough(channels, channels)
}

/// The shape of one image's convolution.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    c: usize,
    h: usize,
    w: usize,
    o: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    pad_h: usize,
    pad_w: usize,
}

impl Geometry {
    fn out_h(&self) -> usize {
        (self.h + 2 * self.pad_h - self.kh) / self.stride + 1
    }

    fn out_w(&self) -> usize {
        (self.w + 2 * self.pad_w - self.kw) / self.stride + 1
    }

    fn out_pixels(&self) -> usize {
        self.out_h() * self.out_w()
    }

    /// The convolution of the output's gradient, with turned kernels, that gives the input's gradient at stride 1.
    fn turned(&self) -> Self {
        Self {
            c: self.o,
            h: self.out_h(),
            w: self.out_w(),
            o: self.c,
            pad_h: self.kh - 1 - self.pad_h,
            pad_w: self.kw - 1 - self.pad_w,
            ..*self
        }
    }
}

struct Conv2d {
    batch: usize,
    bias_per_image: bool,
    geometry: Geometry,
}

impl Kernel<3> for Conv2d {
    const NAME: &'static str = "conv2d";

    fn shape(&self) -> Shape {
        let g = &self.geometry;
        Shape::from((self.batch, g.o, g.out_h(), g.out_w()))
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let (batch, g) = (self.batch, &self.geometry);
        match winograd::pays(batch, g) {
            true => winograd::forward(x, weight, bias, batch, g),
            false => patches::forward(x, weight, Some(bias), batch, g),
        }
    }

    fn backward<T: Real>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [want_x, want_weight, want_bias]: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let (batch, g) = (self.batch, &self.geometry);
        let pays = winograd::pays(batch, g);
        let gx = want_x.then(|| {
            if pays {
                winograd::input_grad(grad, weight, batch, g)
            } else if patches::convolving_pays(batch, g) {
                patches::input_grad_by_convolution(grad, weight, batch, g)
            } else {
                patches::input_grad_by_patches(grad, weight, batch, g)
            }
        });
        let gw = want_weight.then(|| match pays {
            true => winograd::weight_grad(x, grad, batch, g),
            false => patches::weight_grad(x, grad, batch, g),
        });
        let gb = want_bias.then(|| match self.bias_per_image {
            true => sum_planes(grad, 1, batch * g.o, g.out_pixels()),
            false => sum_planes(grad, batch, g.o, g.out_pixels()),
        });
        [gx, gw, gb]
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{assert_close, check_gradients, random};
    use super::*;

    #[test]
    fn forward_equals_candle() -> Result<()> {
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
    fn gradients_match_finite_differences() -> Result<()> {
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
