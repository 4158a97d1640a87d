//! Changes of type, by all cores on the CPU.

use candle_core::{CpuStorage, DType, Result, Storage, Tensor};
use half::{bf16, f16};

use super::autograd_op::{AutogradOp, OpResult, apply};
use super::cpu::TensorView;
#[cfg(feature = "cuda")]
use super::cuda;
use super::half::{narrow, widen};

/// `x` as `dtype`, of the same shape; differentiable. As `torch.Tensor.to`.
///
/// # Errors
/// When the device cannot convert between the two types.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let ours = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if cuda::has_kernel(x) && ours(dtype) {
        return cuda::cast(x, dtype);
    }
    if x.device().is_cpu() && ours(x.dtype()) && ours(dtype) {
        apply(Cast(dtype), [&x.contiguous()?])
    } else {
        x.to_dtype(dtype)
    }
}

struct Cast(DType);

impl AutogradOp<1> for Cast {
    const NAME: &'static str = "cast";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let (to, view) = (self.0, TensorView::of(x));
        let values = match x.dtype() {
            DType::F16 => from_wide(widen(view.slice::<f16>()?), to),
            DType::BF16 => from_wide(widen(view.slice::<bf16>()?), to),
            _ => narrow(view.slice::<f32>()?, to),
        };
        Ok(OpResult::Owned(Storage::Cpu(values), x.shape().clone()))
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(cast(grad, x.dtype())?)])
    }
}

/// Widened numbers as `dtype`.
fn from_wide(wide: Vec<f32>, dtype: DType) -> CpuStorage {
    match dtype {
        DType::F32 => CpuStorage::F32(wide),
        half => narrow(&wide, half),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::gradcheck::device;
    use crate::ops::gradients;

    #[test]
    fn cast_equals_that_of_candle() -> Result<()> {
        let x = Tensor::randn(0f32, 1.0, (3, 1 << 14), &device())?;
        for dtype in [DType::F16, DType::BF16] {
            let half = cast(&x, dtype)?;
            assert_eq!(half.dtype(), dtype);
            let want = x.to_dtype(dtype)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            assert_eq!(cast(&half, DType::F32)?.to_vec2::<f32>()?, want);
        }
        Ok(())
    }

    #[test]
    fn cast_gradient_has_the_type_of_the_operand() -> Result<()> {
        let x = Var::new(&[1f32, 2.0, 3.0], &device())?;
        let (gradients, ()) = gradients(|| {
            let half = cast(&x, DType::F16)?;
            Ok((cast(&half.sqr()?, DType::F32)?.sum_all()?, ()))
        })?;
        let gradient = gradients.get(&x).expect("a gradient");
        assert_eq!(gradient.to_vec1::<f32>()?, [2.0, 4.0, 6.0]);
        Ok(())
    }
}
