//! Low-rank adapters (LoRA) of a UNet: their files, merging them into weights, reducing their rank.
//!
//! A module with an adapter has the weight `W + (alpha / r)·up·down` in place of `W`. Files are read in every layout that diffusers'
//! `load_lora_weights` reads for a UNet, and written in those of diffusers, kohya-ss and PEFT. This room never trains an adapter.

mod error;
mod key;
mod merge;
mod modules;
mod peft_config;
mod rank;
mod read;
mod sgm;
mod targets;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub use error::LoraError;
pub use merge::merge;
pub use modules::{BaseVersion, Modules};
pub use rank::{Kept, reduce_rank};
pub use read::{LoraFile, read};
pub use targets::DEFAULT_TARGETS;
pub use write::Layout;

pub use crate::models::FileContents;

/// Folder of a LoRA in a finished run and in a checkpoint.
pub const FOLDER: &str = "unet_lora";
/// Name of a LoRA's file in diffusers' layout, which `load_lora_weights` looks for in a folder.
pub const DIFFUSERS_FILE: &str = "pytorch_lora_weights.safetensors";
/// Name of the file in kohya's layout beside [`DIFFUSERS_FILE`].
pub const KOHYA_FILE: &str = "lora_kohya.safetensors";

/// A low-rank adapter of one module: `ΔW = (alpha / r)·up·down`.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `A`: `[r, in]` of a linear module, `[r, in, kh, kw]` of a convolution. f32.
    pub down: Tensor,
    /// `B`: `[out, r]` of a linear module, `[out, r, 1, 1]` of a convolution. f32.
    pub up: Tensor,
    /// Numerator of the scaling.
    pub alpha: f64,
}

impl Adapter {
    /// The rank `r`.
    pub fn rank(&self) -> usize {
        self.down.dims().first().copied().unwrap_or_default()
    }

    /// Factor of `up·down`: `alpha / r`.
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank() as f64
    }
}

/// Adapters of a UNet.
#[derive(Clone, Debug, Default)]
pub struct Lora {
    /// Adapters by the full diffusers name of their module, e.g. `mid_block.attentions.0.proj_in`.
    pub adapters: BTreeMap<String, Adapter>,
}

impl Lora {
    /// The greatest rank of an adapter; 0 without adapters.
    pub fn rank(&self) -> usize {
        let ranks = self.adapters.values().map(Adapter::rank);
        ranks.max().unwrap_or_default()
    }
}
