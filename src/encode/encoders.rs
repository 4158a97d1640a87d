//! The frozen encoders of a pipeline on one device.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::image::normalize;
use rayon::prelude::*;

use super::TextEncoder;
use crate::models::{AutoencoderKl, ModelError};

/// Pixels of the images that go through the autoencoder as a batch on the CPU, where that changes nothing of what comes out: more
/// would no longer fit a core's cache.
const PIXELS_TOGETHER: usize = 1 << 14;
/// Pixels of the batches that go through it side by side: a small image is not enough work for several threads, and of large
/// ones each takes much memory.
const PIXELS_SIDE_BY_SIDE: usize = 1 << 16;

fn images_within(pixels: usize, side: usize) -> usize {
    (pixels / (side * side)).max(1)
}

/// Why encoding failed.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor operation failed.
    #[error("encoding on {device}: {source}")]
    Tensor {
        /// The device's name.
        device: String,
        /// The cause.
        source: candle_core::Error,
    },
    /// The stream ended in an error.
    #[error(transparent)]
    Stream(Box<coffey_pipeline::StreamError>),
    /// The system gives no more threads.
    #[error("can't start an encoder thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A thread of the pool was given images and has no VAE.
    #[error("a batch of images reached a thread without a VAE, by a fault in coffey")]
    NoVae,
    /// A thread of the pool was given captions and has no text encoder.
    #[error("captions reached a thread without a text encoder, by a fault in coffey")]
    NoTextEncoder,
    /// A thread of the pool ended without a word.
    #[error("an encoder thread ended by a fault in coffey")]
    Panicked,
}

impl From<coffey_pipeline::StreamError> for EncodeError {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        Self::Stream(error.into())
    }
}

impl EncodeError {
    /// What a failed tensor operation on `device` is.
    pub(super) fn on(device: &Device) -> impl FnOnce(candle_core::Error) -> Self {
        let device = format!("{:?}", device.location());
        move |source| Self::Tensor { device, source }
    }
}

/// Autoencoder, text encoder and tokenizer of a pipeline.
#[derive(Debug)]
pub struct Encoders {
    vae: AutoencoderKl,
    text: TextEncoder,
    device: Device,
    vae_batch: usize,
}

impl Encoders {
    /// Loads them from a pipeline's folder, the autoencoder from `vae` if that is given.
    ///
    /// At most `vae_batch` images go through the autoencoder at once. On the CPU what comes out does not depend on it: small images
    /// go side by side, large ones in turn.
    ///
    /// # Errors
    /// When a folder does not hold what it should.
    pub fn load(
        pipeline: &Path,
        vae: Option<&Path>,
        device: &Device,
        vae_batch: usize,
    ) -> Result<Self, ModelError> {
        let vae = vae.map_or_else(|| pipeline.join("vae"), Path::to_owned);
        Ok(Self {
            vae: AutoencoderKl::load(&vae, DType::F32, device)?,
            text: TextEncoder::load(pipeline, device)?,
            device: device.clone(),
            vae_batch: vae_batch.max(1),
        })
    }

    /// What encodes, alone.
    #[must_use]
    pub fn without_decoder(self) -> Self {
        Self {
            vae: self.vae.without_decoder(),
            ..self
        }
    }

    /// How many images of a batch of `vae_batch` go through the autoencoder at the same time, all threads together.
    pub fn images_at_once(on_cpu: bool, vae_batch: usize, side: usize) -> usize {
        match on_cpu {
            true => images_within(PIXELS_SIDE_BY_SIDE, side).min(vae_batch),
            false => vae_batch,
        }
    }

    /// The folders the weights come from: autoencoder, text encoder.
    pub fn folders(pipeline: &Path, vae: Option<&Path>) -> [PathBuf; 2] {
        [
            vae.map_or_else(|| pipeline.join("vae"), Path::to_owned),
            pipeline.join("text_encoder"),
        ]
    }

    /// The autoencoder.
    pub fn vae(&self) -> &AutoencoderKl {
        &self.vae
    }

    /// The device they are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Width of the text embeddings.
    pub fn text_width(&self) -> usize {
        self.text.width()
    }

    /// Text embeddings of captions: `[B, 77, width]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_text<S: AsRef<str>>(&self, captions: &[S]) -> Result<Tensor, EncodeError> {
        self.text.encode(captions)
    }

    /// Moments of the latents of images: `pixels` holds `[N, 3, side, side]`, 8 bit → `[N, 2C, side/f, side/f]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_pixels(&self, pixels: &[u8], side: usize) -> Result<Tensor, EncodeError> {
        let image = 3 * side * side;
        let encode = |levels: &[u8]| {
            let shape = (levels.len() / image, 3, side, side);
            self.vae
                .encode(&Tensor::from_vec(normalize(levels), shape, &self.device)?)
        };
        let moments: candle_core::Result<Vec<_>> = match self.device.is_cpu() {
            true => {
                let together = match self.vae.encodes_alike(side) {
                    true => images_within(PIXELS_TOGETHER, side),
                    false => 1,
                };
                let side_by_side = images_within(PIXELS_SIDE_BY_SIDE, side).div_ceil(together);
                let batches = pixels.par_chunks(together * image);
                let in_turn = batches.len().div_ceil(side_by_side);
                batches.with_min_len(in_turn).map(encode).collect()
            }
            false => pixels.chunks(self.vae_batch * image).map(encode).collect(),
        };
        moments
            .and_then(|moments| Tensor::cat(&moments, 0))
            .map_err(EncodeError::on(&self.device))
    }
}
