//! Optimiser arithmetic: computed in `f32` for 16-bit parameters, then written over them.

use candle_core::{DType, Result, Tensor, Var};

use super::wide;
use crate::ops::AdamWStep;

/// Writes `value` over a variable, in the variable's dtype.
fn store(target: &Var, value: &Tensor) -> Result<()> {
    target.set(&value.to_dtype(target.dtype())?)
}

/// As [`crate::ops::ema_update()`].
pub(in crate::ops) fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    let kept = (wide(&target.as_detached_tensor())? * decay)?;
    let new = (wide(&source.detach())? * (1.0 - decay))?;
    store(target, &(kept + new)?)
}

/// As [`crate::ops::squared_norm()`], accumulated in `f32` (`f64` for an `f64` tensor).
pub(in crate::ops) fn squared_norm(x: &Tensor) -> Result<f64> {
    let sum = wide(&x.detach())?.sqr()?.sum_all()?;
    sum.to_dtype(DType::F64)?.to_scalar()
}

/// As [`crate::ops::adamw_step()`].
pub(in crate::ops) fn adamw_step(
    param: &Var,
    moment1: &Var,
    moment2: &Var,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let correction1 = 1.0 - step.beta1.powf(step.step as f64);
    let correction2 = 1.0 - step.beta2.powf(step.step as f64);
    let [p, m, v] = [param, moment1, moment2].map(|var| wide(&var.as_detached_tensor()));
    let (p, m, v) = (p?, m?, v?);
    let grad = (wide(&grad.detach())? * grad_scale)?;
    let m = (((&grad - &m)? * (1.0 - step.beta1))? + m)?;
    let v = ((v * step.beta2)? + (grad.sqr()? * (1.0 - step.beta2))?)?;
    let denominator = ((v.sqrt()? * (1.0 / correction2.sqrt()))? + step.epsilon)?;
    let update = (m.div(&denominator)? * (step.learning_rate / correction1))?;
    let kept = (p * (1.0 - step.learning_rate * step.weight_decay))?;
    store(moment1, &m)?;
    store(moment2, &v)?;
    store(param, &(kept - update)?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::gradcheck::{assert_close, random};

    fn var(values: &Tensor, dtype: DType) -> Result<Var> {
        Var::from_tensor(&values.to_dtype(dtype)?)
    }

    #[test]
    fn updates_equal_the_cpu_kernels() -> Result<()> {
        for (dtype, tolerance) in [
            (DType::F32, 1e-6),
            (DType::F64, 1e-6),
            (DType::F16, 2e-3),
            (DType::BF16, 2e-2),
        ] {
            let start = [
                random(&[37], 1)?,
                random(&[37], 2)?,
                random(&[37], 3)?.abs()?,
            ];
            let want = start.each_ref().map(|x| var(x, DType::F32).unwrap());
            let got = start.each_ref().map(|x| var(x, dtype).unwrap());
            for number in 1..=3 {
                let grad = random(&[37], 10 + number)?;
                let step = AdamWStep {
                    learning_rate: 0.1,
                    beta1: 0.9,
                    beta2: 0.99,
                    epsilon: 1e-3,
                    weight_decay: 0.5,
                    step: number,
                };
                let (w, g) = (grad.to_dtype(DType::F32)?, grad.to_dtype(dtype)?);
                crate::ops::adamw_step(&want[0], &want[1], &want[2], &w, 0.5, &step)?;
                adamw_step(&got[0], &got[1], &got[2], &g, 0.5, &step)?;
                crate::ops::ema_update(&want[0], &w, 0.75)?;
                ema_update(&got[0], &g, 0.75)?;
            }
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.dtype(), dtype);
                let (got, want) = (got.to_dtype(DType::F64)?, want.to_dtype(DType::F64)?);
                assert_close(&got, &want, tolerance)?;
            }
        }
        Ok(())
    }

    #[test]
    fn squared_norms_do_not_overflow_in_16_bits() -> Result<()> {
        let x = Tensor::full(300f32, 500, &Device::Cpu)?;
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            assert_eq!(squared_norm(&x.to_dtype(dtype)?)?, 4.5e7, "{dtype:?}");
        }
        Ok(())
    }
}
