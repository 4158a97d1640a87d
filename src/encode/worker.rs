//! What one thread of the pool does: the models it has, and a batch through them.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::{BatchData, F16Array};

use super::{EncodeError, Encoders, TextEncoder};
use crate::config::{Data, TextFrom};
use crate::models::ModelError;
use crate::pretrained::Models;

/// The models that a kind of data needs, on one device.
#[derive(Debug)]
pub enum Worker {
    /// All, for images.
    Images(Box<Encoders>),
    /// The text encoder, for latents with captions.
    Captions(Box<TextEncoder>),
    /// None, for latents with embeddings.
    Stored,
}

impl From<Encoders> for Worker {
    fn from(encoders: Encoders) -> Self {
        Self::Images(Box::new(encoders.without_decoder()))
    }
}

impl Worker {
    /// Loads what the samples of `data` need. At most `vae_batch` images go through the autoencoder at once.
    ///
    /// # Errors
    /// When a folder does not hold what it should.
    pub fn load(
        data: &Data,
        models: &Models,
        device: &Device,
        vae_batch: usize,
    ) -> Result<Self, ModelError> {
        let (pipeline, vae): (&Path, _) = (&models.pipeline, models.vae.as_deref());
        Ok(match data.latents() {
            None => Encoders::load(pipeline, vae, device, vae_batch)?.into(),
            Some(TextFrom::Caption) => Self::Captions(TextEncoder::load(pipeline, device)?.into()),
            Some(TextFrom::Embeds) => Self::Stored,
        })
    }

    /// Moments of the latents, `[B·crops, 2C, h, w]`, and text embeddings, `[B, 77, width]`; f32, on the CPU.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode(
        &self,
        content: BatchData,
        captions: &[&str],
    ) -> Result<[Tensor; 2], EncodeError> {
        let (moments, stored) = match content {
            BatchData::Pixels { levels, resolution } => {
                let Self::Images(encoders) = self else {
                    return Err(EncodeError::NoVae);
                };
                let side = resolution as usize;
                (encoders.encode_pixels(&levels, side)?, None)
            }
            BatchData::Latents {
                moments,
                prompt_embeds,
            } => (tensor(moments)?, prompt_embeds),
        };
        let prompt_embeds = match (stored, self) {
            (Some(embeds), _) => tensor(embeds)?,
            (None, Self::Images(encoders)) => encoders.encode_text(captions)?,
            (None, Self::Captions(text)) => text.encode(captions)?,
            (None, Self::Stored) => return Err(EncodeError::NoTextEncoder),
        };
        let cpu = |tensor: Tensor| {
            let moved = tensor.to_device(&Device::Cpu);
            moved.map_err(EncodeError::on(tensor.device()))
        };
        Ok([cpu(moments)?, cpu(prompt_embeds)?])
    }
}

/// Stored arrays as f32: `[B, …]`.
fn tensor<const D: usize>(halves: F16Array<D>) -> Result<Tensor, EncodeError> {
    let F16Array { values, shape } = halves;
    let each: usize = shape.iter().product();
    let batch = values.len() / each.max(1);
    let shape: Vec<usize> = std::iter::once(batch).chain(shape).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32))
        .map_err(EncodeError::on(&Device::Cpu))
}
