//! candle's `VarBuilder` over [`Weights`]: the way by which a layer gets its parameters.
//!
//! A builder hands out tensors as they are held. It checks their shapes and records which were used; it never makes, casts
//! or moves one. A missing tensor is therefore an error whatever initialisation the caller hints at: a checkpoint that lost a
//! tensor must not be repaired with random numbers.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use super::{ModelError, Weights};

impl Weights {
    /// A builder at the root of the tensors' names.
    ///
    /// Its errors are [`ModelError`]s wrapped for candle; `ModelError::from` unwraps them.
    pub fn builder(&self) -> VarBuilder<'_> {
        let first = self.tensors().values().find(|t| t.dtype().is_float());
        let (dtype, device) = first.map_or((DType::F32, Device::Cpu), |tensor| {
            (tensor.dtype(), tensor.device().clone())
        });
        VarBuilder::from_backend(Box::new(self), dtype, device)
    }
}

impl SimpleBackend for &Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, _: DType, _: &Device) -> Result<Tensor> {
        let needed = || shape.dims().to_vec();
        let Some(tensor) = self.take(name) else {
            return Err(wrapped(ModelError::MissingTensor {
                origin: self.origin_of(name),
                name: name.to_owned(),
                needed: needed(),
                hint: self.explain(Some(name)),
            }));
        };
        if tensor.shape() != &shape {
            return Err(wrapped(ModelError::WrongShape {
                origin: self.origin_of(name),
                name: name.to_owned(),
                found: tensor.dims().to_vec(),
                needed: needed(),
            }));
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        self.take(name).ok_or_else(|| Error::CannotFindTensor {
            path: name.to_owned(),
        })
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors().contains_key(name)
    }
}

/// A model error as an error of candle, which [`ModelError::from`] takes out again.
fn wrapped(error: ModelError) -> Error {
    Error::WrappedContext {
        context: error.to_string(),
        wrapped: Box::new(error),
    }
}

impl From<Error> for ModelError {
    fn from(error: Error) -> Self {
        match error {
            Error::WrappedContext { wrapped, context } => match wrapped.downcast::<Self>() {
                Ok(error) => *error,
                Err(wrapped) => Self::Tensor(Error::WrappedContext { wrapped, context }),
            },
            other => Self::Tensor(other),
        }
    }
}
