//! Affine maps over channels that also turn a feature map into tokens or back: a transformer's way in and out. Reading one
//! operand transposed costs the matrix product nothing, and no transposed copy is made.

use candle_core::{Result, Shape, Tensor};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::cpu::{Real, real, sum1};
use super::gemm::{Mat, MatMut, Threads, gemm};
use super::kernel::{Kernel, apply3, has_kernel};
use super::linear::sum_rows;

/// A 1x1 convolution whose result is laid out as tokens, one a pixel.
///
/// `x`: `[B, C, H, W]`, `weight`: `[O, C]` or `[O, C, 1, 1]`, `bias`: `[O]` → `[B, H·W, O]`.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn map_to_tokens(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (batch, inputs, h, w) = x.dims4()?;
    let outputs = outputs(x, inputs, weight, bias)?;
    if !has_kernel(x) {
        return super::tensor::map_to_tokens(x, weight, bias);
    }
    let projection = Projection {
        batch,
        inputs,
        outputs,
        pixels: h * w,
    };
    apply3(ToTokens(projection), [x, weight, bias])
}

/// A 1x1 convolution of a feature map that is laid out as tokens, one a pixel.
///
/// `x`: `[B, H·W, C]`, `weight`: `[O, C]` or `[O, C, 1, 1]`, `bias`: `[O]`, `size`: H and W → `[B, O, H, W]`.
///
/// # Errors
/// When the shapes or dtypes do not fit together.
pub fn tokens_to_map(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    size: (usize, usize),
) -> Result<Tensor> {
    let (batch, pixels, inputs) = x.dims3()?;
    let outputs = outputs(x, inputs, weight, bias)?;
    if pixels != size.0 * size.1 {
        candle_core::bail!("tokens_to_map: x is {:?} but the map {size:?}", x.dims());
    }
    if !has_kernel(x) {
        return super::tensor::tokens_to_map(x, weight, bias, size);
    }
    let projection = Projection {
        batch,
        inputs,
        outputs,
        pixels,
    };
    apply3(ToMap(projection, size), [x, weight, bias])
}

fn outputs(x: &Tensor, inputs: usize, weight: &Tensor, bias: &Tensor) -> Result<usize> {
    match weight.dims() {
        [o, c] | [o, c, 1, 1] if *c == inputs && bias.dims() == [*o] => Ok(*o),
        dims => candle_core::bail!(
            "a projection of {:?}: weight is {dims:?}, bias {:?}",
            x.dims(),
            bias.dims()
        ),
    }
}

/// Output channels whose weight gradient one task computes.
const OUTPUTS: usize = 32;

#[derive(Clone, Copy)]
struct Projection {
    batch: usize,
    inputs: usize,
    outputs: usize,
    pixels: usize,
}

impl Projection {
    /// The map `[channels, pixels]` of one image.
    fn map<'a, T>(&self, data: &'a [T], image: usize, channels: usize) -> Mat<'a, T> {
        let size = channels * self.pixels;
        Mat::new(
            &data[image * size..][..size],
            channels,
            self.pixels,
            self.pixels,
        )
    }

    /// The same when it is laid out as tokens `[pixels, channels]`.
    fn tokens<'a, T>(&self, data: &'a [T], image: usize, channels: usize) -> Mat<'a, T> {
        let size = channels * self.pixels;
        Mat::new(
            &data[image * size..][..size],
            self.pixels,
            channels,
            channels,
        )
        .t()
    }

    fn weight<'a, T>(&self, weight: &'a [T]) -> Mat<'a, T> {
        Mat::new(weight, self.outputs, self.inputs, self.inputs)
    }

    /// Writes every image of `out`: in parallel when there are enough of them, else each with all threads.
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

    /// The weight's gradient, summed over images in order: `x` and `grad` give the maps of an image.
    fn weight_grad<'a, T: Real>(
        &self,
        x: impl Fn(usize) -> Mat<'a, T> + Sync,
        grad: impl Fn(usize) -> Mat<'a, T> + Sync,
    ) -> Vec<T> {
        let mut out = vec![T::zero(); self.outputs * self.inputs];
        out.par_chunks_mut(OUTPUTS * self.inputs)
            .enumerate()
            .for_each(|(block, out)| {
                let rows = out.len() / self.inputs;
                for image in 0..self.batch {
                    let grad = grad(image).rows(block * OUTPUTS, rows);
                    let dst = MatMut::new(out, rows, self.inputs, self.inputs);
                    gemm(dst, image > 0, T::one(), grad, x(image).t(), Threads::One);
                }
            });
        out
    }
}

struct ToTokens(Projection);

impl Kernel<3> for ToTokens {
    const NAME: &'static str = "map_to_tokens";

    fn shape(&self) -> Shape {
        Shape::from((self.0.batch, self.0.pixels, self.0.outputs))
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let p = self.0;
        let mut out = vec![T::zero(); p.batch * p.pixels * p.outputs];
        p.each_image(&mut out, |image, out, threads| {
            for token in out.chunks_exact_mut(p.outputs) {
                token.copy_from_slice(bias);
            }
            let dst = MatMut::new(out, p.pixels, p.outputs, p.outputs);
            let (x, weight) = (p.map(x, image, p.inputs).t(), p.weight(weight).t());
            gemm(dst, true, T::one(), x, weight, threads);
        });
        out
    }

    fn backward<T: Real>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [want_x, want_weight, want_bias]: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let p = self.0;
        let gx = want_x.then(|| {
            let mut out = vec![T::zero(); x.len()];
            p.each_image(&mut out, |image, out, threads| {
                let dst = MatMut::new(out, p.inputs, p.pixels, p.pixels);
                let grad = p.tokens(grad, image, p.outputs);
                gemm(dst, false, T::one(), p.weight(weight).t(), grad, threads);
            });
            out
        });
        let gw = want_weight.then(|| {
            p.weight_grad(
                |image| p.map(x, image, p.inputs),
                |image| p.tokens(grad, image, p.outputs),
            )
        });
        [gx, gw, want_bias.then(|| sum_rows(grad, p.outputs))]
    }
}

struct ToMap(Projection, (usize, usize));

impl Kernel<3> for ToMap {
    const NAME: &'static str = "tokens_to_map";

    fn shape(&self) -> Shape {
        Shape::from((self.0.batch, self.0.outputs, self.1.0, self.1.1))
    }

    fn forward<T: Real>(&self, [x, weight, bias]: [&[T]; 3]) -> Vec<T> {
        let p = self.0;
        let mut out = vec![T::zero(); p.batch * p.pixels * p.outputs];
        p.each_image(&mut out, |image, out, threads| {
            for (plane, &b) in out.chunks_exact_mut(p.pixels).zip(bias) {
                plane.fill(b);
            }
            let dst = MatMut::new(out, p.outputs, p.pixels, p.pixels);
            let x = p.tokens(x, image, p.inputs);
            gemm(dst, true, T::one(), p.weight(weight), x, threads);
        });
        out
    }

    fn backward<T: Real>(
        &self,
        [x, weight, _]: [&[T]; 3],
        grad: &[T],
        [want_x, want_weight, want_bias]: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let p = self.0;
        let gx = want_x.then(|| {
            let mut out = vec![T::zero(); x.len()];
            p.each_image(&mut out, |image, out, threads| {
                let dst = MatMut::new(out, p.pixels, p.inputs, p.inputs);
                let grad = p.map(grad, image, p.outputs).t();
                gemm(dst, false, T::one(), grad, p.weight(weight), threads);
            });
            out
        });
        let gw = want_weight.then(|| {
            p.weight_grad(
                |image| p.tokens(x, image, p.inputs),
                |image| p.map(grad, image, p.outputs),
            )
        });
        [
            gx,
            gw,
            want_bias.then(|| sum_planes(grad, p.batch, p.outputs, p.pixels)),
        ]
    }
}

/// Sums `[B, C, pixels]` over images and pixels: the gradient of a bias of a map's channels.
pub(super) fn sum_planes<T: Real>(x: &[T], batch: usize, channels: usize, pixels: usize) -> Vec<T> {
    let channel = |c: usize| -> f64 {
        let planes = (0..batch).map(|b| &x[(b * channels + c) * pixels..][..pixels]);
        planes.map(sum).sum()
    };
    (0..channels)
        .into_par_iter()
        .map(|c| real(channel(c)))
        .collect()
}

#[pulp::with_simd(sum = Arch::new())]
#[inline(always)]
fn sum_on<S: Simd, T: Real>(_: S, x: &[T]) -> f64 {
    sum1(x, |x| x)
}

#[cfg(test)]
mod tests {
    use super::super::conv2d;
    use super::super::gradcheck::{assert_close, check_gradients, random};
    use super::*;

    #[test]
    fn equal_convolutions_of_single_pixels() -> Result<()> {
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
    fn gradients_match_finite_differences() -> Result<()> {
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
