//! Gated activations.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{D, Result, Tensor};

use super::wide;
use crate::ops::computed::{TensorOp, apply1};

/// As [`crate::ops::geglu()`], which checks the shape.
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    apply1(Geglu, x)
}

struct Geglu;

/// The value and the gate, and the normal distribution function of the gate.
fn parts(x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let width = x.dim(D::Minus1)? / 2;
    let half = |i: usize| wide(&x.narrow(D::Minus1, i * width, width)?)?.contiguous();
    let (value, gate) = (half(0)?, half(1)?);
    let cdf = (((&gate * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    Ok((value, gate, cdf))
}

impl TensorOp<1> for Geglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        let (value, gate, cdf) = parts(x)?;
        value.mul(&gate)?.mul(&cdf)?.to_dtype(x.dtype())
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let (value, gate, cdf) = parts(&x.detach())?;
        let grad = wide(grad)?;
        let pdf = ((gate.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * PI).sqrt()))?;
        let value_grad = grad.mul(&gate)?.mul(&cdf)?;
        let gate_grad = grad.mul(&value)?.mul(&(cdf + gate.mul(&pdf)?)?)?;
        let grad = Tensor::cat(&[value_grad, gate_grad], D::Minus1)?;
        Ok([Some(grad.to_dtype(x.dtype())?)])
    }
}
