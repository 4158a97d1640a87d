//! [`ops::conv2d`](crate::ops::conv2d()) on the CPU: by Winograd's filtering where that is faster, else as matrix products.

mod patches;
mod winograd;

use candle_core::{Result, Shape, Tensor};

use super::kernel::{Kernel, apply};
use super::real::Real;
use super::reduce::sum_planes;
use crate::ops::bias_or_zeros;

/// As [`crate::ops::conv2d()`], which checks the shapes.
pub(in crate::ops) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let (batch, c, h, w) = x.dims4()?;
    let (o, _, kh, kw) = weight.dims4()?;
    let bias = bias_or_zeros(bias, o, x)?;
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
    let kernel = Conv2dKernel {
        batch,
        bias_per_image: bias.rank() == 2,
        geometry,
    };
    apply(kernel, [x, weight, &bias])
}

/// Whether a batch of images, of at most `channels` channels and at least `side` pixels a side, is convolved on the CPU to the
/// bits that each image would give alone. For smaller images the algorithm may depend on the size of the batch.
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

    /// The convolution that gives the input's gradient at stride 1: of the output's gradient, with turned kernels.
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

struct Conv2dKernel {
    batch: usize,
    bias_per_image: bool,
    geometry: Geometry,
}

impl Kernel<3> for Conv2dKernel {
    const NAME: &'static str = "conv2d";

    fn shape(&self) -> Shape {
        let g = &self.geometry;
        Shape::from((self.batch, g.o, g.out_h(), g.out_w()))
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let (batch, g) = (self.batch, &self.geometry);
        if winograd::pays(batch, g) {
            winograd::forward(x, weight, bias, batch, g)
        } else {
            patches::forward(x, weight, Some(bias), batch, g)
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
        let gw = want_weight.then(|| {
            if pays {
                winograd::weight_grad(x, grad, batch, g)
            } else {
                patches::weight_grad(x, grad, batch, g)
            }
        });
        let gb = want_bias.then(|| {
            if self.bias_per_image {
                sum_planes(grad, 1, batch * g.o, g.out_pixels())
            } else {
                sum_planes(grad, batch, g.o, g.out_pixels())
            }
        });
        [gx, gw, gb]
    }
}
