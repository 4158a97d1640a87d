//! [`ops::geglu`](crate::ops::geglu()) and [`ops::quick_gelu`](crate::ops::quick_gelu()) of candle's tensor operations.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{D, Result, Tensor};

use super::wide;
use crate::ops::activation::QUICK;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

/// As [`crate::ops::geglu()`], which checks the shape.
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    apply(GegluOp, [x])
}

/// As [`crate::ops::quick_gelu()`], differentiated by candle: SiLU with a scaled argument.
pub(in crate::ops) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    (x * QUICK)?.silu()? * (1.0 / QUICK)
}

struct GegluOp;

/// The halves of the last dimension, wide.
struct Gated {
    value: Tensor,
    gate: Tensor,
    /// The normal distribution function of the gate.
    cdf: Tensor,
}

impl Gated {
    fn new(x: &Tensor) -> Result<Self> {
        let width = x.dim(D::Minus1)? / 2;
        let half = |i: usize| wide(&x.narrow(D::Minus1, i * width, width)?)?.contiguous();
        let (value, gate) = (half(0)?, half(1)?);
        let cdf = (((&gate * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
        Ok(Self { value, gate, cdf })
    }
}

impl AutogradOp<1> for GegluOp {
    const NAME: &'static str = "geglu";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let Gated { value, gate, cdf } = Gated::new(x)?;
        Ok(value.mul(&gate)?.mul(&cdf)?.to_dtype(x.dtype())?.into())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let Gated { value, gate, cdf } = Gated::new(&x.detach())?;
        let grad = wide(grad)?;
        let pdf = ((gate.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * PI).sqrt()))?;
        let value_grad = grad.mul(&gate)?.mul(&cdf)?;
        let gate_grad = grad.mul(&value)?.mul(&(cdf + gate.mul(&pdf)?)?)?;
        let grad = Tensor::cat(&[value_grad, gate_grad], D::Minus1)?;
        Ok([Some(grad.to_dtype(x.dtype())?)])
    }
}
