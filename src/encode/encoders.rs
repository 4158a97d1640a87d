//! The frozen encoders of a pipeline on one device.

use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::image::normalize;
use coffey_pipeline::{BatchData, F16Array};
use rayon::prelude::*;

use crate::conditioning::{EncodedText, TextEncoder, TextEncoderError};
use crate::models::{AutoencoderKl, Conditioning, ModelError};

/// Pixels of the images that pass the autoencoder as one batch on the CPU, where batching changes no bit of the result. More
/// pixels no longer fit a core's cache.
const PIXELS_PER_BATCH: usize = 1 << 14;
/// Pixels of the batches that pass the autoencoder in parallel on the CPU. One small image is not enough work for several
/// threads; large images in parallel need too much memory.
const PIXELS_IN_PARALLEL: usize = 1 << 16;

/// How many images of `side`² pixels have at most `pixels` pixels; at least one.
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
    /// The system starts no more threads.
    #[error("can't start an encoder thread: {0}")]
    Thread(#[from] std::io::Error),
    /// An encoder thread panicked.
    #[error("an encoder thread panicked: a fault in coffey")]
    Panicked,
    /// The wait for a batch was cancelled.
    #[error("the wait for the next batch was cancelled")]
    Cancelled,
    /// No batch came in time.
    #[error("no batch came in {} s", .0.as_secs())]
    TimedOut(Duration),
}

impl From<coffey_pipeline::StreamError> for EncodeError {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        Self::Stream(error.into())
    }
}

impl EncodeError {
    /// Turns a failed tensor operation on `device` into an error that names the device.
    fn on(device: &Device) -> impl FnOnce(candle_core::Error) -> Self {
        let device = format!("{:?}", device.location());
        move |source| Self::Tensor { device, source }
    }
}

/// Autoencoder, text encoder and tokenizer of a pipeline on one device.
#[derive(Debug)]
pub struct Encoders {
    vae: AutoencoderKl,
    text: TextEncoder,
    device: Device,
    vae_batch: usize,
}

/// How encoders are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderOptions {
    /// Images that pass the autoencoder at once on a GPU, at least 1.
    ///
    /// On the CPU the results do not depend on it: small images are encoded in parallel, large images in turn.
    pub vae_batch: usize,
    /// Type that the autoencoder's weights are held in and computed with.
    pub vae_dtype: DType,
    /// Type that the text encoder's weights are held in and computed with.
    pub text_dtype: DType,
}

impl EncoderOptions {
    /// Everything in `f32`.
    pub fn exact(vae_batch: usize) -> Self {
        Self {
            vae_batch,
            vae_dtype: DType::F32,
            text_dtype: DType::F32,
        }
    }
}

/// A batch after the encoders, on the device that made it.
#[derive(Clone, Debug)]
pub struct EncoderOutput {
    /// Mean and log-variance of the latents, unscaled: `[B·crops, 2C, h, w]` f32, a sample's crops one after another.
    pub moments: Tensor,
    /// Conditioning on the captions, `B` samples.
    pub conditioning: Conditioning,
    /// Number of captions that have more tokens than fit, and were cut; captions with stored embeddings are not counted.
    pub truncated: usize,
}

impl Encoders {
    /// Loads the encoders of the pipeline in the folder `pipeline`; the autoencoder from `vae` if it is given.
    ///
    /// # Errors
    /// When a file is missing, or is not of such a model.
    pub fn load(
        pipeline: &Path,
        vae: Option<&Path>,
        device: &Device,
        options: EncoderOptions,
    ) -> Result<Self, ModelError> {
        let vae = vae.map_or_else(|| pipeline.join("vae"), Path::to_owned);
        Ok(Self {
            vae: AutoencoderKl::load(&vae, options.vae_dtype, device)?,
            text: TextEncoder::load(pipeline, options.text_dtype, device)?,
            device: device.clone(),
            vae_batch: options.vae_batch.max(1),
        })
    }

    /// The same encoders without the autoencoder's decoder, which only drawing needs.
    #[must_use]
    pub fn without_decoder(self) -> Self {
        Self {
            vae: self.vae.without_decoder(),
            ..self
        }
    }

    /// Number of images of a batch of `vae_batch` that pass the autoencoder at the same time, all threads together.
    pub fn images_at_once(on_cpu: bool, vae_batch: usize, side: usize) -> usize {
        if on_cpu {
            images_within(PIXELS_IN_PARALLEL, side).min(vae_batch)
        } else {
            vae_batch
        }
    }

    /// Folders that the weights are read from: autoencoder, text encoder.
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

    /// Tokens of the tokenizer.
    pub fn tokens(&self) -> usize {
        self.text.tokens()
    }

    /// Width of the text encoder's hidden states.
    pub fn text_width(&self) -> usize {
        self.text.width()
    }

    /// Numbers of a head of the text encoder's attention.
    pub fn text_head_width(&self) -> usize {
        self.text.head_width()
    }

    /// Encodes the parts of a batch that are not stored in its shards.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode(
        &self,
        content: BatchData,
        captions: &[&str],
    ) -> Result<EncoderOutput, EncodeError> {
        let (moments, stored) = match content {
            BatchData::Pixels { levels, resolution } => {
                (self.encode_pixels(&levels, resolution as usize)?, None)
            }
            BatchData::Latents {
                moments,
                prompt_embeds,
            } => (stored_tensor(moments)?, prompt_embeds),
        };
        let EncodedText {
            conditioning,
            truncated,
        } = match stored {
            Some(embeds) => EncodedText {
                conditioning: Conditioning::text(stored_tensor(embeds)?),
                truncated: 0,
            },
            None => self.encode_captions(captions)?,
        };
        Ok(EncoderOutput {
            moments,
            conditioning,
            truncated,
        })
    }

    /// Conditioning on captions; see [`TextEncoder::encode`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_text<S: AsRef<str>>(&self, captions: &[S]) -> Result<Conditioning, EncodeError> {
        Ok(self.encode_captions(captions)?.conditioning)
    }

    fn encode_captions<S: AsRef<str>>(&self, captions: &[S]) -> Result<EncodedText, EncodeError> {
        self.text.encode(captions).map_err(|error| match error {
            TextEncoderError::Tokenizer(error) => error.into(),
            TextEncoderError::Tensor(error) => EncodeError::on(&self.device)(error),
        })
    }

    /// Moments of the latents of images: `pixels` holds `[N, 3, side, side]` u8 → `[N, 2C, side/f, side/f]` f32.
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
        let moments: candle_core::Result<Vec<_>> = if self.device.is_cpu() {
            let per_batch = if self.vae.encodes_alike(side) {
                images_within(PIXELS_PER_BATCH, side)
            } else {
                1
            };
            let in_parallel = images_within(PIXELS_IN_PARALLEL, side).div_ceil(per_batch);
            let batches = pixels.par_chunks(per_batch * image);
            let in_turn = batches.len().div_ceil(in_parallel);
            batches.with_min_len(in_turn).map(encode).collect()
        } else {
            pixels.chunks(self.vae_batch * image).map(encode).collect()
        };
        moments
            .and_then(|moments| Tensor::cat(&moments, 0))
            .map_err(EncodeError::on(&self.device))
    }

    /// Images of scaled latents: `[B, C, h, w]` → `[B, 3, f·h, f·w]` f32 in -1 to 1.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn decode_latents(&self, latents: &Tensor) -> Result<Tensor, EncodeError> {
        let decode = || {
            let latents = latents.to_device(&self.device)?.to_dtype(DType::F32)?;
            self.vae
                .decode(&(latents * (1.0 / self.vae.config().scaling_factor))?)
        };
        decode().map_err(EncodeError::on(&self.device))
    }
}

/// Stored f16 arrays as an f32 tensor `[B, …]` on the CPU.
fn stored_tensor<const D: usize>(halves: F16Array<D>) -> Result<Tensor, EncodeError> {
    let F16Array { values, shape } = halves;
    let each: usize = shape.iter().product();
    let batch = values.len() / each.max(1);
    let shape: Vec<usize> = std::iter::once(batch).chain(shape).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32))
        .map_err(EncodeError::on(&Device::Cpu))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoders_in_16_bits_give_nearly_the_same() {
        let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart/teacher");
        let pixels: Vec<u8> = (0..3 * 64 * 64u32)
            .map(|i| (i * i / 7 % 251) as u8)
            .collect();
        let encode = |dtype| {
            let options = EncoderOptions {
                vae_batch: 1,
                vae_dtype: dtype,
                text_dtype: dtype,
            };
            let encoders = Encoders::load(&teacher, None, &Device::Cpu, options).unwrap();
            let moments = encoders.encode_pixels(&pixels, 64).unwrap();
            let text = encoders.encode_text(&["a red apple"]).unwrap();
            [moments, text.hidden]
        };
        let number = |tensor: Tensor| tensor.to_scalar::<f32>().unwrap();
        let exact = encode(DType::F32);
        for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.08)] {
            for (got, want) in encode(dtype).iter().zip(&exact) {
                assert_eq!(got.dtype(), DType::F32);
                let apart = number((got - want).unwrap().abs().unwrap().max_all().unwrap());
                let scale = number(want.abs().unwrap().max_all().unwrap());
                assert!(
                    0.0 < apart && apart < tolerance * scale,
                    "{dtype:?}: {apart} of {scale}"
                );
            }
        }
    }
}
