//! Changes of type.

use candle_core::{DType, Result, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::kernel::View;

/// Elements a task converts.
const CHUNK: usize = 1 << 14;

/// `x` as `dtype`, without a graph. 16-bit numbers on the CPU are widened to `f32` by all cores.
///
/// # Errors
/// When the tensor can't be read.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let x = x.detach();
    match (x.device().is_cpu(), x.dtype(), dtype) {
        (true, DType::F16, DType::F32) => widen::<f16>(&x),
        (true, DType::BF16, DType::F32) => widen::<bf16>(&x),
        _ => x.to_dtype(dtype),
    }
}

fn widen<H: WithDType>(x: &Tensor) -> Result<Tensor>
where
    [H]: HalfFloatSliceExt,
{
    let x = x.contiguous()?;
    let view = View::of(&x);
    let half = view.slice::<H>()?;
    let mut wide = vec![0f32; half.len()];
    wide.par_chunks_mut(CHUNK)
        .zip(half.par_chunks(CHUNK))
        .for_each(|(wide, half)| half.convert_to_f32_slice(wide));
    Tensor::from_vec(wide, x.dims(), x.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_equals_candles_cast() -> Result<()> {
        let x = Tensor::randn(0f32, 1.0, (3, CHUNK), &candle_core::Device::Cpu)?;
        for dtype in [DType::F16, DType::BF16] {
            let half = x.to_dtype(dtype)?;
            let want = half.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            assert_eq!(cast(&half, DType::F32)?.to_vec2::<f32>()?, want);
        }
        Ok(())
    }
}
