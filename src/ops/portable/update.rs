//! Optimiser arithmetic of candle's tensor operations: computed in `f32` for 16-bit parameters, then written over them.

use candle_core::{DType, Result, Tensor, Var};

use super::wide;
use crate::ops::adamw8bit::{BLOCK, BlockMoments, BlockQuantized};
use crate::ops::dynamic_map::{DynamicMap, SIGNED, UNSIGNED};
use crate::ops::{AdamWStep, update};

/// Writes `value` over a variable, in the variable's dtype.
fn store(target: &Var, value: &Tensor) -> Result<()> {
    target.set(&value.to_dtype(target.dtype())?)
}

/// As [`crate::ops::update::ema_update()`].
pub(in crate::ops) fn ema_update(target: &Var, source: &Tensor, decay: f64) -> Result<()> {
    let kept = (wide(&target.as_detached_tensor())? * decay)?;
    let new = (wide(&source.detach())? * (1.0 - decay))?;
    store(target, &(kept + new)?)
}

/// As [`crate::ops::update::squared_norm()`], accumulated in `f32` (`f64` for an `f64` tensor).
pub(in crate::ops) fn squared_norm(x: &Tensor) -> Result<f64> {
    let sum = wide(&x.detach())?.sqr()?.sum_all()?;
    sum.to_dtype(DType::F64)?.to_scalar()
}

/// As [`crate::ops::update::adamw_step()`].
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

/// As [`crate::ops::adamw8bit::adamw8bit_step()`]: the moments of this one parameter are widened for the step.
pub(in crate::ops) fn adamw8bit_step(
    param: &Var,
    moments: &mut BlockMoments,
    grad: &Tensor,
    grad_scale: f64,
    step: &AdamWStep,
) -> Result<()> {
    let wide = |moment: &BlockQuantized, map: &DynamicMap| {
        Var::from_tensor(&dequantized(moment, map)?.reshape(param.shape())?)
    };
    let m = wide(&moments.first, &SIGNED)?;
    let v = wide(&moments.second, &UNSIGNED)?;
    update::adamw_step(param, &m, &v, grad, grad_scale, step)?;
    *moments = BlockMoments {
        first: quantized(&m, &SIGNED)?,
        second: quantized(&v, &UNSIGNED)?,
    };
    Ok(())
}

/// The numbers `[n]` that a moment's codes stand for.
fn dequantized(moment: &BlockQuantized, map: &DynamicMap) -> Result<Tensor> {
    let (n, blocks) = (moment.codes.elem_count(), moment.absmax.elem_count());
    let values = Tensor::new(map.values(), moment.codes.device())?;
    let absmax = moment.absmax.unsqueeze(1)?.broadcast_as((blocks, BLOCK))?;
    let absmax = absmax.flatten_all()?.narrow(0, 0, n)?;
    // candle takes the greatest u8 for a missing index.
    values.index_select(&moment.codes.to_dtype(DType::U32)?, 0)? * absmax
}

/// A moment as the nearest values of the map, found by halving the interval eight times.
fn quantized(moment: &Var, map: &DynamicMap) -> Result<BlockQuantized> {
    let x = moment.as_detached_tensor().flatten_all()?;
    let (n, device) = (x.elem_count(), x.device());
    let blocks = n.div_ceil(BLOCK);
    let padded = x.pad_with_zeros(0, 0, blocks * BLOCK - n)?;
    let padded = padded.reshape((blocks, BLOCK))?;
    let absmax = padded.abs()?.max_keepdim(1)?;
    let one = absmax.ones_like()?;
    let divisor = absmax.gt(0.0)?.where_cond(&absmax, &one)?;
    let scaled = padded.broadcast_div(&divisor)?.flatten_all()?;
    let scaled = scaled.narrow(0, 0, n)?.contiguous()?;
    let middles = Tensor::new(map.middles(), device)?;
    let mut codes = Tensor::zeros(n, DType::U32, device)?;
    for half in [128u32, 64, 32, 16, 8, 4, 2, 1] {
        let half = Tensor::full(half, n, device)?;
        let upper = (&codes + &half)?;
        let middle = middles.index_select(&(&upper - Tensor::ones(n, DType::U32, device)?)?, 0)?;
        codes = scaled.gt(&middle)?.where_cond(&upper, &codes)?;
    }
    Ok(BlockQuantized {
        codes: codes.to_dtype(DType::U8)?,
        absmax: absmax.flatten_all()?,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::gradcheck::{assert_close, device, on_cpu, random};

    fn var(values: &Tensor, dtype: DType) -> Result<Var> {
        Var::from_tensor(&values.to_dtype(dtype)?)
    }

    #[test]
    fn portable_updates_equal_the_cpu_kernels() -> Result<()> {
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
            let want = on_cpu(&start)?;
            let want: Vec<Var> = want.iter().map(|x| var(x, DType::F32).unwrap()).collect();
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
                let g = grad.to_dtype(dtype)?;
                let w = &on_cpu(&[grad.to_dtype(DType::F32)?])?[0];
                update::adamw_step(&want[0], &want[1], &want[2], w, 0.5, &step)?;
                adamw_step(&got[0], &got[1], &got[2], &g, 0.5, &step)?;
                update::ema_update(&want[0], w, 0.75)?;
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
    fn squared_norm_does_not_overflow_in_16_bits() -> Result<()> {
        let x = Tensor::full(300f32, 500, &device())?;
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            assert_eq!(squared_norm(&x.to_dtype(dtype)?)?, 4.5e7, "{dtype:?}");
        }
        Ok(())
    }
}
