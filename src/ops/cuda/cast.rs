//! [`ops::cast`](crate::ops::cast()) by candle's kernels, with a backward that casts and adds nothing.

use candle_core::backend::BackendStorage;
use candle_core::{DType, Result, Storage, Tensor, bail};

use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

/// As [`crate::ops::cast()`].
pub(in crate::ops) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    apply(Cast(dtype), [x])
}

struct Cast(DType);

impl AutogradOp<1> for Cast {
    const NAME: &'static str = "cast";

    fn forward(&self, [x]: [&Tensor; 1]) -> Result<OpResult> {
        let (storage, layout) = x.storage_and_layout();
        let cast = match &*storage {
            Storage::Cpu(storage) => Storage::Cpu(storage.to_dtype(layout, self.0)?),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => Storage::Cuda(storage.to_dtype(layout, self.0)?),
            _ => bail!("no cast on this device"),
        };
        Ok(OpResult::Owned(cast, layout.shape().clone()))
    }

    fn backward(&self, [x]: [&Tensor; 1], grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(grad.to_dtype(x.dtype())?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_cast_there_and_back_changes_nothing() -> Result<()> {
        let there_and_back = |t: &[Tensor]| {
            let x = t[0].transpose(0, 1)?;
            cast(&cast(&x, DType::F32)?, x.dtype())
        };
        check(&[random(&[3, 5], 1)?], &there_and_back, &|t| t[0].t())
    }
}
