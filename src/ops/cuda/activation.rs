//! Activations by kernels.

use candle_core::{D, Result, Tensor};

use super::bias::packed;
use super::gpu::{Arg, Module, Output, empty_like, launch, module};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

const MODULE: Module = module!("activation");

/// As [`crate::ops::silu()`].
pub(in crate::ops) fn silu(x: &Tensor) -> Result<Tensor> {
    pointwise(x, "silu_forward", "silu_backward")
}

/// As [`crate::ops::quick_gelu()`].
pub(in crate::ops) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    pointwise(x, "quick_gelu_forward", "quick_gelu_backward")
}

/// As [`crate::ops::gelu()`].
pub(in crate::ops) fn gelu(x: &Tensor) -> Result<Tensor> {
    pointwise(x, "gelu_forward", "gelu_backward")
}

fn pointwise(x: &Tensor, forward: &'static str, backward: &'static str) -> Result<Tensor> {
    apply(Pointwise { forward, backward }, [&x.contiguous()?])
}

/// A function of each number, by the kernels of these names.
struct Pointwise {
    forward: &'static str,
    backward: &'static str,
}

impl AutogradOp<1> for Pointwise {
    const NAME: &'static str = "activation";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let (out, count) = (
            Output::new(x.shape(), x.dtype(), x.device())?,
            x.elem_count(),
        );
        let kernel = packed(MODULE, self.forward, x.dtype(), count);
        let args = [Arg::Tensor(x), Arg::Output(&out), Arg::long(count)];
        launch(x, &kernel, &args)?;
        Ok(out.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let (grad, x_grad, count) = (grad.contiguous()?, empty_like(x)?, x.elem_count());
        let kernel = packed(MODULE, self.backward, x.dtype(), count);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Tensor(&grad),
                Arg::Tensor(&x_grad),
                Arg::long(count),
            ],
        )?;
        Ok([Some(x_grad)])
    }
}

/// As [`crate::ops::geglu()`], which checks the shape.
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    apply(Geglu, [&x.contiguous()?])
}

struct Geglu;

impl AutogradOp<1> for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let width = x.dim(D::Minus1)? / 2;
        let rows = x.elem_count() / (2 * width);
        let mut shape = x.dims().to_vec();
        shape[x.rank() - 1] = width;
        let out = Output::new(shape, x.dtype(), x.device())?;
        let kernel = packed(MODULE, "geglu_forward", x.dtype(), rows * width);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Output(&out),
                Arg::long(rows),
                Arg::int(width)?,
            ],
        )?;
        Ok(out.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let width = x.dim(D::Minus1)? / 2;
        let rows = x.elem_count() / (2 * width);
        let (grad, x_grad) = (grad.contiguous()?, empty_like(x)?);
        let kernel = packed(MODULE, "geglu_backward", x.dtype(), rows * width);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Tensor(&grad),
                Arg::Tensor(&x_grad),
                Arg::long(rows),
                Arg::int(width)?,
            ],
        )?;
        Ok([Some(x_grad)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_geglu_equals_the_cpu() -> Result<()> {
        for shape in [&[2, 3, 6][..], &[5, 130], &[3, 48]] {
            let reference = |t: &[Tensor]| crate::ops::geglu(&t[0]);
            check(&[random(shape, 1)?], &|t| geglu(&t[0]), &reference)?;
        }
        Ok(())
    }

    #[test]
    fn cuda_activations_equal_the_cpu() -> Result<()> {
        let x = [(random(&[3, 77], 1)? * 4.0)?];
        check(&x, &|t| silu(&t[0]), &|t| t[0].silu())?;
        let quick = |t: &[Tensor]| crate::ops::quick_gelu(&t[0]);
        check(&x, &|t| quick_gelu(&t[0]), &quick)?;
        // candle differentiates the exact GELU too roughly for this.
        let gated = |t: &[Tensor]| {
            let one = t[0].ones_like()?;
            crate::ops::geglu(&Tensor::cat(&[&one, &t[0]], 1)?)
        };
        check(&x, &|t| gelu(&t[0]), &gated)
    }
}
