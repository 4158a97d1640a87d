//! Merging adapters into the weights of their modules.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::{Adapter, Lora, LoraError};

/// Adds `scale·(alpha / r)·up·down` to the weight of each module with an adapter. `base`: tensors of the UNet by name, f32; merged
/// weights are new tensors on the base's device. As `fuse_lora` of diffusers.
///
/// # Errors
/// When `base` lacks a weight or has one of another shape.
pub fn merge(
    base: &mut BTreeMap<String, Tensor>,
    lora: &Lora,
    scale: f64,
) -> Result<(), LoraError> {
    for (module, adapter) in &lora.adapters {
        let name = format!("{module}.weight");
        let shape = adapter.shape();
        let missing = || LoraError::NoBase {
            name: name.clone(),
            shape: shape.clone(),
        };
        let weight = base.get_mut(&name).ok_or_else(missing)?;
        if weight.dims() != shape {
            return Err(missing());
        }
        let change = adapter.change(scale)?.to_device(weight.device())?;
        *weight = (weight.to_dtype(DType::F32)? + change)?;
    }
    Ok(())
}

impl Adapter {
    /// Shape of the weight that the adapter belongs to: `[out, in]` or `[out, in, kh, kw]`.
    fn shape(&self) -> Vec<usize> {
        let outputs = self.up.dims().iter().take(1);
        let inputs = self.down.dims().iter().skip(1);
        outputs.chain(inputs).copied().collect()
    }

    /// `scale·(alpha / r)·up·down` in the shape of the weight, f32. As `get_delta_weight` of PEFT.
    fn change(&self, scale: f64) -> Result<Tensor, LoraError> {
        let up = self.up.flatten_from(1)?.to_dtype(DType::F32)?;
        let down = self.down.flatten_from(1)?.to_dtype(DType::F32)?;
        let product = up.matmul(&down)?;
        Ok((product * (scale * self.scaling()))?.reshape(self.shape())?)
    }
}
