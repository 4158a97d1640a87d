//! Sizes of models, from their configurations and the headers of their weights.

use std::collections::BTreeMap;
use std::path::Path;

use coffey_pipeline::Content;

use crate::config::Lora;
use crate::encode::Encoders;
use crate::lora::{LoraError, Modules};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{
    Adapter, ModelError, TEXT_ENCODER_STEM, TextParts, UNetConfig, VaeConfig, count_parameters,
    tensor_shapes,
};

/// The command that a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `coffey train`.
    Train,
    /// `coffey precompute`.
    Precompute,
    /// `coffey bench`: the stream of training without its models.
    Bench,
}

/// Inputs of the estimate besides the configuration.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// The command.
    pub command: Command,
    /// Ranks that share the lanes, at least 1.
    pub ranks: usize,
    /// Mean size of a sample in its shard, if it was measured. Bytes.
    pub sample_bytes: Option<u64>,
    /// Content of the shards.
    pub content: Content,
    /// The encoders; `None` for `bench`.
    pub encoders: Option<EncoderSizes>,
    /// The teacher, for `train`.
    pub teacher: Option<TeacherSizes>,
}

/// Text encoders and VAE.
#[derive(Clone, Copy, Debug)]
pub struct EncoderSizes {
    /// Parameters of the text encoders.
    pub text: u64,
    /// Parameters of the VAE, including its decoder.
    pub vae: u64,
    /// Parameters of the VAE's decoder.
    pub vae_decoder: u64,
    /// Channels of the VAE's first level.
    pub vae_channels: u64,
    /// Pixels of a latent along one side.
    pub downscale: usize,
}

/// The network that is distilled.
#[derive(Clone, Debug)]
pub struct TeacherSizes {
    /// Its parameters.
    pub parameters: u64,
    /// Its configuration.
    pub unet: UNetConfig,
    /// Parameters of the block with the most of them, a unit of activation checkpointing.
    pub largest_block: u64,
    /// Parameters of the adapters, where a LoRA is trained.
    pub adapters: Option<u64>,
}

impl EncoderSizes {
    /// Reads the encoders of the pipeline in the folder `pipeline`; the autoencoder in `vae` if it is given.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn read(pipeline: &Path, vae: Option<&Path>) -> Result<Self, ModelError> {
        let vae = Encoders::vae_folder(pipeline, vae);
        let text = TextParts::of(pipeline);
        let text = text.text_encoders();
        let text = text.map(|folder| count_parameters(folder, TEXT_ENCODER_STEM, |_| true));
        let decodes =
            |name: &str| name.starts_with("decoder.") || name.starts_with("post_quant_conv.");
        let config = VaeConfig::read(&vae)?;
        Ok(Self {
            text: text.sum::<Result<u64, _>>()?,
            vae: count_parameters(&vae, WEIGHTS_STEM, |_| true)?,
            vae_decoder: count_parameters(&vae, WEIGHTS_STEM, decodes)?,
            vae_channels: config.base_channels() as u64,
            downscale: config.downscale(),
        })
    }
}

impl TeacherSizes {
    /// Reads the network of the pipeline in the folder `pipeline`. `lora`: the LoRA that is trained over it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the LoRA's targets do not fit the network.
    pub fn read(pipeline: &Path, lora: Option<&Lora>) -> Result<Self, LoraError> {
        let folder = pipeline.join("unet");
        let adapters = |lora: &Lora| {
            let modules = Modules::read(&folder)?.targeted(&lora.targets)?;
            let shapes = modules
                .iter()
                .flat_map(|(_, weight)| Adapter::shapes(weight, lora.rank));
            let numbers = shapes.map(|shape| shape.iter().product::<usize>() as u64);
            Ok::<u64, LoraError>(numbers.sum())
        };
        Ok(Self {
            unet: UNetConfig::read(&folder)?,
            parameters: count_parameters(&folder, WEIGHTS_STEM, |_| true)?,
            largest_block: largest_block(tensor_shapes(&folder, WEIGHTS_STEM)?),
            adapters: lora.map(adapters).transpose()?,
        })
    }
}

/// Parameters of the block with the most of them, of a UNet with tensors of these names and shapes.
fn largest_block(tensors: BTreeMap<String, Vec<usize>>) -> u64 {
    let mut blocks = BTreeMap::<String, u64>::new();
    for (name, shape) in tensors {
        let mut parts = name.split_inclusive('.');
        // `down_blocks.1.attentions.0.`, `mid_block.resnets.0.`
        let kind = |part: &&str| matches!(*part, "attentions." | "resnets.");
        let Some(at) = parts.clone().position(|part| kind(&part)) else {
            continue;
        };
        let block = parts.by_ref().take(at + 2).collect();
        *blocks.entry(block).or_default() += shape.iter().product::<usize>() as u64;
    }
    blocks.into_values().max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_block_is_the_resnet_or_transformer_with_most_parameters() {
        let tensors = [
            ("conv_in.weight", vec![1000, 9]),
            ("down_blocks.1.attentions.0.proj_in.weight", vec![4, 5]),
            ("down_blocks.1.attentions.0.norm.bias", vec![4]),
            ("down_blocks.1.attentions.10.proj_in.weight", vec![4, 5]),
            ("mid_block.resnets.0.conv1.weight", vec![2, 2, 3, 3]),
        ];
        let tensors = tensors.map(|(name, shape)| (name.to_owned(), shape));
        assert_eq!(largest_block(tensors.into()), 36);
        assert_eq!(largest_block(BTreeMap::new()), 0);
    }
}
