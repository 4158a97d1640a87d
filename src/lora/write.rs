//! Writing a LoRA's file.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::modules::{BaseVersion, kohya_name};
use super::{Lora, LoraError, peft_config};
use crate::models::{FileContents, model_metadata};
use crate::ops::all_finite;

/// Layout of a LoRA's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// diffusers' names, `unet.MODULE.lora_A.weight`; `up` is multiplied by alpha / rank, because readers without the metadata take
    /// alpha = rank.
    Diffusers,
    /// diffusers' names with `up` as it is; alphas that are not the rank are in the metadata `lora_adapter_metadata`.
    DiffusersWithAlpha,
    /// kohya's names, `lora_unet_NAME.lora_down.weight`, with `.alpha` tensors; the metadata tells the family of the base model. All
    /// alphas are the most frequent one, and `up` is multiplied by what is left: diffusers loses alphas of attention that differ.
    Kohya(Option<BaseVersion>),
    /// PEFT's names, `base_model.model.MODULE.lora_A.weight`, for `adapter_model.safetensors`; alphas are in
    /// [`Lora::adapter_config`].
    Peft,
}

impl Lora {
    /// The content of this LoRA's file in the given layout, with tensors of type `dtype`.
    ///
    /// # Errors
    /// When a value does not fit the type.
    pub fn contents(&self, layout: Layout, dtype: DType) -> Result<FileContents, LoraError> {
        let mut metadata = model_metadata();
        match layout {
            Layout::Kohya(Some(base)) => {
                let entries = base.metadata().iter();
                metadata.extend(entries.map(|&(key, value)| (key.to_owned(), value.to_owned())));
            }
            Layout::DiffusersWithAlpha if self.is_scaled() => {
                let key = peft_config::METADATA_KEY.to_owned();
                metadata.insert(key, peft_config::metadata(self));
            }
            _ => {}
        }
        let alpha = self.usual_alpha(dtype)?;
        let mut tensors = BTreeMap::new();
        for (module, adapter) in &self.adapters {
            let factor = match layout {
                Layout::Diffusers => adapter.scaling(),
                Layout::Kohya(_) => adapter.alpha / alpha,
                Layout::DiffusersWithAlpha | Layout::Peft => 1.0,
            };
            let up = match factor == 1.0 {
                true => adapter.up.clone(),
                false => (&adapter.up * factor)?,
            };
            let [down_name, up_name] = names(layout, module);
            for (name, tensor) in [(down_name, &adapter.down), (up_name, &up)] {
                let tensor = cast(&name, tensor, dtype)?;
                tensors.insert(name, tensor);
            }
            if matches!(layout, Layout::Kohya(_)) {
                let name = format!("lora_unet_{}.alpha", kohya_name(module));
                let alpha = Tensor::new(alpha, adapter.up.device())?;
                let alpha = cast(&name, &alpha, dtype)?;
                tensors.insert(name, alpha);
            }
        }
        Ok(FileContents { tensors, metadata })
    }

    /// The text of PEFT's `adapter_config.json`, which belongs to a file in [`Layout::Peft`].
    pub fn adapter_config(&self) -> String {
        peft_config::adapter_config(self)
    }

    /// The most frequent alpha, as `dtype` has it; 1 if that is zero or no number.
    fn usual_alpha(&self, dtype: DType) -> Result<f64, LoraError> {
        let alphas = self.adapters.values().map(|adapter| adapter.alpha);
        let usual = peft_config::most_frequent(alphas.map(f64::to_bits));
        let usual = f64::from_bits(usual.unwrap_or_default());
        let rounded = Tensor::new(usual, &Device::Cpu)?.to_dtype(dtype)?;
        let rounded = rounded.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        Ok(match rounded.is_normal() {
            true => rounded,
            false => 1.0,
        })
    }

    /// Whether an adapter's alpha is not its rank.
    fn is_scaled(&self) -> bool {
        let mut adapters = self.adapters.values();
        adapters.any(|adapter| adapter.scaling() != 1.0)
    }
}

/// Names of a module's `down` and `up`.
fn names(layout: Layout, module: &str) -> [String; 2] {
    match layout {
        Layout::Diffusers | Layout::DiffusersWithAlpha => {
            ["A", "B"].map(|part| format!("unet.{module}.lora_{part}.weight"))
        }
        Layout::Peft => {
            ["A", "B"].map(|part| format!("base_model.model.{module}.lora_{part}.weight"))
        }
        Layout::Kohya(_) => {
            let name = kohya_name(module);
            ["down", "up"].map(|part| format!("lora_unet_{name}.lora_{part}.weight"))
        }
    }
}

fn cast(name: &str, tensor: &Tensor, dtype: DType) -> Result<Tensor, LoraError> {
    let tensor = tensor.to_dtype(dtype)?;
    match dtype == DType::F32 || all_finite(&tensor)? {
        true => Ok(tensor),
        false => Err(LoraError::Overflow {
            name: name.to_owned(),
            dtype: dtype.as_str(),
        }),
    }
}
