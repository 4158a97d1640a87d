//! [`ops::map_to_tokens`](crate::ops::map_to_tokens()) and [`ops::tokens_to_map`](crate::ops::tokens_to_map()) on the CPU.
//!
//! Reading one operand transposed costs the matrix product nothing, and no transposed copy is made.

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, gemm};
use super::kernel::{Kernel, apply};
use super::linear::BIAS_ROWS;
use super::real::Real;
use super::reduce::{sum_planes, sum_rows};

/// As [`crate::ops::map_to_tokens()`], which checks the shapes.
pub(in crate::ops) fn map_to_tokens(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (batch, inputs, h, w) = x.dims4()?;
    let (outputs, pixels) = (weight.dim(0)?, h * w);
    let kernel = ProjectionKernel {
        batch,
        inputs,
        outputs,
        pixels,
        from: PixelLayout::Map,
        to: PixelLayout::Tokens,
        shape: Shape::from((batch, pixels, outputs)),
    };
    apply(kernel, [x, weight, bias])
}

/// As [`crate::ops::tokens_to_map()`], which checks the shapes.
pub(in crate::ops) fn tokens_to_map(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    (h, w): (usize, usize),
) -> Result<Tensor> {
    let (batch, pixels, inputs) = x.dims3()?;
    let outputs = weight.dim(0)?;
    let kernel = ProjectionKernel {
        batch,
        inputs,
        outputs,
        pixels,
        from: PixelLayout::Tokens,
        to: PixelLayout::Map,
        shape: Shape::from((batch, outputs, h, w)),
    };
    apply(kernel, [x, weight, bias])
}

/// How the channels and pixels of an image are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PixelLayout {
    /// `[channels, pixels]`.
    Map,
    /// `[pixels, channels]`.
    Tokens,
}

/// Output channels whose weight gradient one task computes.
const OUTPUTS: usize = 32;

struct ProjectionKernel {
    batch: usize,
    inputs: usize,
    outputs: usize,
    pixels: usize,
    from: PixelLayout,
    to: PixelLayout,
    shape: Shape,
}

impl ProjectionKernel {
    /// One image of `data` as a matrix `[channels, pixels]`, whatever its layout.
    fn image<'a, T>(
        &self,
        data: &'a [T],
        layout: PixelLayout,
        channels: usize,
        index: usize,
    ) -> Mat<'a, T> {
        let (size, pixels) = (channels * self.pixels, self.pixels);
        let image = &data[index * size..][..size];
        match layout {
            PixelLayout::Map => Mat::new(image, channels, pixels, pixels),
            PixelLayout::Tokens => Mat::new(image, pixels, channels, channels).t(),
        }
    }

    /// Writes `lhs · rhs` `[channels, pixels]` into `out`, which is laid out as `layout` says; adds it if `accumulate`.
    fn product<T: Real>(
        &self,
        out: &mut [T],
        layout: PixelLayout,
        accumulate: bool,
        lhs: Mat<'_, T>,
        rhs: Mat<'_, T>,
        threads: Threads,
    ) {
        let (channels, pixels) = (out.len() / self.pixels, self.pixels);
        match layout {
            PixelLayout::Map => {
                let dst = MatMut::new(out, channels, pixels, pixels);
                gemm(dst, accumulate, T::one(), lhs, rhs, threads);
            }
            PixelLayout::Tokens => {
                let dst = MatMut::new(out, pixels, channels, channels);
                gemm(dst, accumulate, T::one(), rhs.t(), lhs.t(), threads);
            }
        }
    }

    fn weight<'a, T>(&self, weight: &'a [T]) -> Mat<'a, T> {
        Mat::new(weight, self.outputs, self.inputs, self.inputs)
    }

    /// Writes every image of `out`: in parallel if there are enough images, else each with all threads.
    fn each_image<T: Real>(&self, out: &mut [T], work: impl Fn(usize, &mut [T], Threads) + Sync) {
        let size = out.len() / self.batch;
        if self.batch >= rayon::current_num_threads() {
            out.par_chunks_exact_mut(size)
                .enumerate()
                .for_each(|(image, out)| work(image, out, Threads::One));
        } else {
            for (image, out) in out.chunks_exact_mut(size).enumerate() {
                work(image, out, Threads::Pool);
            }
        }
    }

    /// The weight's gradient `[outputs, inputs]`, summed over images in order.
    fn weight_grad<T: Real>(&self, x: &[T], grad: &[T]) -> Vec<T> {
        let mut out = vec![T::zero(); self.outputs * self.inputs];
        out.par_chunks_mut(OUTPUTS * self.inputs)
            .enumerate()
            .for_each(|(block, out)| {
                let rows = out.len() / self.inputs;
                for image in 0..self.batch {
                    let x = self.image(x, self.from, self.inputs, image);
                    let grad = self.image(grad, self.to, self.outputs, image);
                    let grad = grad.rows(block * OUTPUTS, rows);
                    let dst = MatMut::new(out, rows, self.inputs, self.inputs);
                    gemm(dst, image > 0, T::one(), grad, x.t(), Threads::One);
                }
            });
        out
    }
}

impl Kernel<3> for ProjectionKernel {
    const NAME: &'static str = "projection";

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let mut out = vec![T::zero(); self.batch * self.pixels * self.outputs];
        self.each_image(&mut out, |image, out, threads| {
            match self.to {
                PixelLayout::Map => {
                    for (plane, &b) in out.chunks_exact_mut(self.pixels).zip(bias) {
                        plane.fill(b);
                    }
                }
                PixelLayout::Tokens => {
                    for token in out.chunks_exact_mut(self.outputs) {
                        token.copy_from_slice(bias);
                    }
                }
            }
            let x = self.image(x, self.from, self.inputs, image);
            self.product(out, self.to, true, self.weight(weight), x, threads);
        });
        out
    }

    fn backward<T: Real>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [want_x, want_weight, want_bias]: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let gx = want_x.then(|| {
            let mut out = vec![T::zero(); x.len()];
            self.each_image(&mut out, |image, out, threads| {
                let grad = self.image(grad, self.to, self.outputs, image);
                let weight = self.weight(weight).t();
                self.product(out, self.from, false, weight, grad, threads);
            });
            out
        });
        let gw = want_weight.then(|| self.weight_grad(x, grad));
        let gb = want_bias.then(|| match self.to {
            PixelLayout::Map => sum_planes(grad, self.batch, self.outputs, self.pixels),
            PixelLayout::Tokens => sum_rows(grad, self.outputs, BIAS_ROWS),
        });
        [gx, gw, gb]
    }
}
