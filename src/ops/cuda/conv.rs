//! [`ops::conv2d`](crate::ops::conv2d()) by cuDNN, and a kernel that adds the bias in place.
//!
//! A kernel of one pixel is a product of matrices. Without cuDNN other convolutions are [`portable`](crate::ops::portable)'s.

use candle_core::{DType, Result, Tensor, bail};

use super::bias::{add_bias, bias_grad};
#[cfg(feature = "cudnn")]
use super::cudnn;
use super::gpu::{Arg, Output};
use super::projection::pointwise;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply, if_tracked};
use crate::ops::{cast, portable};

/// As [`crate::ops::conv2d()`], which checks the shapes. The bias may be in `f32`.
pub(in crate::ops) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    if (&weight.dims()[2..], stride, padding) == (&[1, 1], 1, 0) {
        return pointwise(x, weight, bias);
    }
    let has_library = cfg!(feature = "cudnn") || (cfg!(test) && x.device().is_cpu());
    if !has_library {
        let bias = bias.map(|bias| cast(bias, x.dtype())).transpose()?;
        return portable::conv2d(x, weight, bias.as_ref(), stride, padding);
    }
    let (x, weight) = (&x.contiguous()?, &weight.contiguous()?);
    let op = Conv2d(Convolution::new(x, weight, stride, padding)?);
    match bias {
        Some(bias) => apply(op, [x, weight, &bias.contiguous()?]),
        None => apply(op, [x, weight]),
    }
}

/// A convolution of contiguous tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Convolution {
    pub(super) dtype: DType,
    /// `[B, C, H, W]`.
    pub(super) x: [usize; 4],
    /// `[O, C, kh, kw]`.
    pub(super) weight: [usize; 4],
    pub(super) stride: usize,
    pub(super) padding: usize,
}

impl Convolution {
    fn new(x: &Tensor, weight: &Tensor, stride: usize, padding: usize) -> Result<Self> {
        if x.dtype() != weight.dtype() {
            bail!(
                "conv2d: x in {:?}, weight in {:?}",
                x.dtype(),
                weight.dtype()
            );
        }
        Ok(Self {
            dtype: x.dtype(),
            x: x.dims4()?.into(),
            weight: weight.dims4()?.into(),
            stride,
            padding,
        })
    }

    /// The shape of the result: `[B, O, H', W']`.
    pub(super) fn y(&self) -> [usize; 4] {
        let [batch, _, h, w] = self.x;
        let [o, _, kh, kw] = self.weight;
        let size = |pixels, kernel| (pixels + 2 * self.padding - kernel) / self.stride + 1;
        [batch, o, size(h, kh), size(w, kw)]
    }
}

/// The part of a convolution `y = x * weight` that is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pass {
    /// `y`, of `[x, weight]`.
    Forward,
    /// The gradient of `x`, of `[weight, gradient of y]`.
    InputGrad,
    /// The gradient of `weight`, of `[x, gradient of y]`.
    WeightGrad,
}

/// An algorithm of a library.
#[cfg(any(feature = "cudnn", test))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<A> {
    pub(super) algorithm: A,
    /// Whether it gives the same bits each time.
    pub(super) deterministic: bool,
    /// Bytes that it needs beside operands and result.
    pub(super) workspace: usize,
}

/// The algorithms that may be used, the best first: in the library's order those that need at most `limit` bytes, then the others,
/// the smallest first.
#[cfg(any(feature = "cudnn", test))]
pub(super) fn ranked<A: Copy>(candidates: &[Candidate<A>], limit: usize) -> Vec<Candidate<A>> {
    let deterministic = candidates.iter().filter(|c| c.deterministic).copied();
    let mut ranked: Vec<Candidate<A>> = deterministic.collect();
    ranked.sort_by_key(|c| if c.workspace <= limit { 0 } else { c.workspace });
    ranked
}

struct Conv2d(Convolution);

impl Conv2d {
    fn run(&self, pass: Pass, operands: [&Tensor; 2]) -> Result<Output> {
        let conv = &self.0;
        let shape = match pass {
            Pass::Forward => conv.y(),
            Pass::InputGrad => conv.x,
            Pass::WeightGrad => conv.weight,
        };
        let [a, b] = operands;
        if a.dtype() != conv.dtype || b.dtype() != conv.dtype {
            bail!(
                "conv2d in {:?}: {:?}, {:?}",
                conv.dtype,
                a.dtype(),
                b.dtype()
            );
        }
        match a.device() {
            #[cfg(feature = "cudnn")]
            candle_core::Device::Cuda(device) => {
                let out = Output::new(shape.to_vec(), conv.dtype, a.device())?;
                cudnn::convolve(device, pass, conv, operands, &out)?;
                Ok(out)
            }
            #[cfg(test)]
            candle_core::Device::Cpu => tests::on_the_cpu(pass, conv, operands, &shape),
            device => bail!("no cuDNN for {shape:?} on {device:?}"),
        }
    }

    /// The gradients of `x` and `weight`. `grad`: contiguous.
    fn gradients(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (pixels, kernels) = (&x.detach(), &weight.detach());
        let run = |pass, operands| Ok(self.run(pass, operands)?.into_tensor());
        Ok([
            if_tracked(x, || run(Pass::InputGrad, [kernels, grad]))?,
            if_tracked(weight, || run(Pass::WeightGrad, [pixels, grad]))?,
        ])
    }

    /// The result's images, channels and pixels.
    fn sizes(&self) -> [usize; 3] {
        let [batch, o, h, w] = self.0.y();
        [batch, o, h * w]
    }
}

impl AutogradOp<2> for Conv2d {
    const NAME: &'static str = "conv2d";

    fn forward(&self, operands: [&Tensor; 2]) -> Result<OpResult> {
        Ok(self.run(Pass::Forward, operands)?.into())
    }

    fn backward(&self, [x, weight]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        self.gradients(x, weight, &grad.contiguous()?)
    }
}

impl AutogradOp<3> for Conv2d {
    const NAME: &'static str = "conv2d";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let y = self.run(Pass::Forward, [x, weight])?;
        add_bias(Arg::Output(&y), x.dtype(), self.sizes(), bias)?;
        Ok(y.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let grad = &grad.contiguous()?;
        let [x_grad, weight_grad] = self.gradients(x, weight, grad)?;
        let bias_grad = if_tracked(bias, || bias_grad(grad, self.sizes(), bias))?;
        Ok([x_grad, weight_grad, bias_grad])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Storage, Var};

    use super::*;
    use crate::ops;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    /// The results of cuDNN's calls, by the portable convolution.
    pub(super) fn on_the_cpu(
        pass: Pass,
        conv: &Convolution,
        [a, b]: [&Tensor; 2],
        shape: &[usize],
    ) -> Result<Output> {
        let convolve = |x: &Tensor, weight: &Tensor| {
            portable::conv2d(x, weight, None, conv.stride, conv.padding)
        };
        let of = |wanted: &Var, [x, weight]: [&Tensor; 2], grad: &Tensor| {
            let sum = || convolve(x, weight)?.mul(grad)?.sum_all();
            let (grads, ()) = ops::gradients(|| Ok((sum()?, ())))?;
            Ok::<_, candle_core::Error>(grads.get(wanted).expect("a gradient").clone())
        };
        let unknown = Var::zeros(shape, conv.dtype, a.device())?;
        let result = match pass {
            Pass::Forward => convolve(a, b)?,
            Pass::InputGrad => of(&unknown, [&unknown, a], b)?,
            Pass::WeightGrad => of(&unknown, [a, &unknown], b)?,
        };
        assert_eq!(result.dims(), shape);
        let result = result.copy()?;
        let (storage, _) = result.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok(Output::of(Storage::Cpu(storage.clone()), shape)),
            _ => bail!("on the CPU"),
        }
    }

    #[test]
    fn cuda_conv2d_equals_the_cpu() -> Result<()> {
        for (x, weight, stride, padding) in [
            ([2, 3, 5, 6], [4, 3, 3, 3], 1, 1),
            ([3, 2, 6, 6], [5, 2, 3, 3], 2, 1),
            ([1, 2, 7, 5], [1, 2, 3, 3], 2, 0),
            ([2, 6, 3, 4], [4, 6, 1, 1], 1, 0),
            ([1, 3, 4, 4], [2, 3, 1, 1], 2, 0),
        ] {
            let (batch, o) = (x[0], weight[0]);
            let mut inputs = vec![random(&x, 1)?, random(&weight, 2)?];
            check(
                &inputs,
                &|t| conv2d(&t[0], &t[1], None, stride, padding),
                &|t| ops::conv2d(&t[0], &t[1], None, stride, padding),
            )?;
            for bias in [random(&[o], 3)?, random(&[batch, o], 3)?] {
                inputs.truncate(2);
                inputs.push(bias);
                check(
                    &inputs,
                    &|t| conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
                    &|t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn cuda_algorithms_are_deterministic_and_fit() {
        let candidate = |algorithm, deterministic, workspace| Candidate {
            algorithm,
            deterministic,
            workspace,
        };
        let offered = [
            candidate('a', false, 0),
            candidate('b', true, 5000),
            candidate('c', true, 100),
            candidate('d', true, 0),
            candidate('e', true, 3000),
            candidate('f', false, 9000),
        ];
        let order: String = ranked(&offered, 1000).iter().map(|c| c.algorithm).collect();
        assert_eq!(order, "cdeb");
    }
}
