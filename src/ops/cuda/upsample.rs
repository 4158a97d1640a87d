//! [`ops::upsample_nearest_2x`](crate::ops::upsample_nearest_2x()) by kernels.

use candle_core::{Result, Tensor};

use super::gpu::{Arg, Launch, Module, Output, empty_like, launch, module};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

const MODULE: Module = module!("upsample");

/// As [`crate::ops::upsample_nearest_2x()`].
pub(in crate::ops) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    apply(Upsample, [&x.contiguous()?])
}

struct Upsample;

impl Upsample {
    /// Launches a kernel with a thread for each element of `x`.
    fn launch(x: &Tensor, name: &str, from: Arg<'_>, to: Arg<'_>) -> Result<()> {
        let (b, c, h, w) = x.dims4()?;
        let kernel = Launch::elementwise(MODULE, name, x.dtype(), x.elem_count());
        launch(x, &kernel, &[from, to, Arg::long(b * c * h), Arg::int(w)?])
    }
}

impl AutogradOp<1> for Upsample {
    const NAME: &'static str = "upsample_nearest_2x";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let (b, c, h, w) = x.dims4()?;
        let out = Output::new((b, c, 2 * h, 2 * w), x.dtype(), x.device())?;
        Self::launch(x, "upsample_forward", Arg::Tensor(x), Arg::Output(&out))?;
        Ok(out.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let (grad, x_grad) = (grad.contiguous()?, empty_like(x)?);
        let (from, to) = (Arg::Tensor(&grad), Arg::Tensor(&x_grad));
        Self::launch(x, "upsample_backward", from, to)?;
        Ok([Some(x_grad)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_upsampling_equals_the_cpu() -> Result<()> {
        let reference = |t: &[Tensor]| crate::ops::upsample_nearest_2x(&t[0]);
        let ours = |t: &[Tensor]| upsample_nearest_2x(&t[0]);
        check(&[random(&[2, 3, 5, 7], 1)?], &ours, &reference)
    }
}
