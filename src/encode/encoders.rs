//! The frozen encoders of a pipeline on one device.

use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::image::normalize;
use coffey_pipeline::text::escaped;
use coffey_pipeline::{BatchData, F16Array, SampleMeta};
use rayon::prelude::*;

use crate::conditioning::{EncodedText, SizeIds, TextEncoder, TextEncoderError, Unconditional};
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
    /// A sample without the sizes that SDXL is told.
    #[error(
        "sample {key}: its json has no original_width and original_height under \"coffey\", which SDXL is told of each image: run \
         coffey precompute again, or set data.micro_conditioning = \"fixed\""
    )]
    NoSize {
        /// The sample's key.
        key: String,
    },
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

/// Autoencoder, text encoders and tokenizers of a pipeline on one device.
#[derive(Debug)]
pub struct Encoders {
    vae: AutoencoderKl,
    text: TextEncoder,
    device: Device,
    vae_batch: usize,
    told_sizes: ToldSizes,
}

/// The sizes that SDXL is told of a training image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToldSizes {
    /// The image's own size and crop.
    Own,
    /// The sizes of an image as large as its crop, whatever its own size is.
    Uncropped,
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
    /// Type that the text encoders' weights are held in and computed with.
    pub text_dtype: DType,
    /// Sizes in the conditioning of a pipeline that has them (SDXL).
    pub told_sizes: ToldSizes,
}

impl EncoderOptions {
    /// Everything in `f32`.
    pub fn exact(vae_batch: usize) -> Self {
        Self {
            vae_batch,
            vae_dtype: DType::F32,
            text_dtype: DType::F32,
            told_sizes: ToldSizes::Own,
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
        Ok(Self {
            vae: AutoencoderKl::load(&Self::vae_folder(pipeline, vae), options.vae_dtype, device)?,
            text: TextEncoder::load(pipeline, options.text_dtype, device)?,
            device: device.clone(),
            vae_batch: options.vae_batch.max(1),
            told_sizes: options.told_sizes,
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

    /// Folder of the autoencoder: `vae` if it is given, else that of the pipeline in the folder `pipeline`.
    pub fn vae_folder(pipeline: &Path, vae: Option<&Path>) -> PathBuf {
        vae.map_or_else(|| pipeline.join("vae"), Path::to_owned)
    }

    /// The autoencoder.
    pub fn vae(&self) -> &AutoencoderKl {
        &self.vae
    }

    /// The device they are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The text encoders with their tokenizers.
    pub fn text(&self) -> &TextEncoder {
        &self.text
    }

    /// Encodes the parts of a batch that are not stored in its shards.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode(
        &self,
        content: BatchData,
        samples: &[SampleMeta],
    ) -> Result<EncoderOutput, EncodeError> {
        let (moments, stored) = match content {
            BatchData::Pixels { levels, resolution } => {
                (self.encode_pixels(&levels, resolution as usize)?, None)
            }
            BatchData::Latents {
                moments,
                prompt_embeds,
                pooled,
            } => {
                let stored = prompt_embeds.map(|hidden| -> Result<_, EncodeError> {
                    Ok(Conditioning {
                        pooled: pooled.map(stored_tensor).transpose()?,
                        ..Conditioning::text(stored_tensor(hidden)?)
                    })
                });
                (stored_tensor(moments)?, stored.transpose()?)
            }
        };
        let EncodedText {
            conditioning,
            truncated,
        } = match stored {
            Some(conditioning) => EncodedText {
                conditioning,
                truncated: 0,
            },
            None => {
                let captions: Vec<&str> = samples.iter().map(|s| s.caption.as_str()).collect();
                self.encode_captions(&captions)?
            }
        };
        let conditioning = if self.tells_sizes() {
            let (_, _, height, width) = moments.dims4().map_err(EncodeError::on(&self.device))?;
            let target = [height, width].map(|side| (side * self.vae.config().downscale()) as u32);
            let sizes = samples.iter().map(|sample| self.size_of(sample, target));
            let sizes = sizes.collect::<Result<Vec<_>, _>>()?;
            self.with_sizes(conditioning, &sizes)?
        } else {
            conditioning
        };
        Ok(EncoderOutput {
            moments,
            conditioning,
            truncated,
        })
    }

    /// Whether the network is told the size of an image: that of a pipeline with two text encoders is.
    fn tells_sizes(&self) -> bool {
        self.text.pooled_width().is_some()
    }

    /// The size ids of a sample, whose crop is `target` pixels high and wide.
    fn size_of(&self, sample: &SampleMeta, target: [u32; 2]) -> Result<SizeIds, EncodeError> {
        let geometry = &sample.geometry;
        let (width, height) = geometry.original;
        match (self.told_sizes, geometry.crops.first()) {
            (ToldSizes::Uncropped, _) => Ok(SizeIds::uncropped(target)),
            (ToldSizes::Own, Some(crop)) if width > 0 && height > 0 => Ok(SizeIds {
                original: [height, width],
                crop: [crop.top, crop.left],
                target,
            }),
            (ToldSizes::Own, _) => Err(EncodeError::NoSize {
                key: escaped(&sample.key).into_owned(),
            }),
        }
    }

    /// The same conditioning with size ids, one for each sample, if the pipeline has them.
    fn with_sizes(
        &self,
        conditioning: Conditioning,
        sizes: &[SizeIds],
    ) -> Result<Conditioning, EncodeError> {
        if !self.tells_sizes() {
            return Ok(conditioning);
        }
        let device = conditioning.hidden.device();
        let size = SizeIds::tensor(sizes, device).map_err(EncodeError::on(device))?;
        Ok(Conditioning {
            size: Some(size),
            ..conditioning
        })
    }

    /// Conditioning on captions, for training: without size ids. See [`TextEncoder::encode`].
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_text<S: AsRef<str>>(&self, captions: &[S]) -> Result<Conditioning, EncodeError> {
        Ok(self.encode_captions(captions)?.conditioning)
    }

    /// Conditioning on no caption, one sample, for training: without size ids.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn unconditional(&self, kind: Unconditional) -> Result<Conditioning, EncodeError> {
        self.text.unconditional(kind).map_err(|e| self.failed(e))
    }

    /// Conditioning on captions, for drawing: images of `size`, height and width in pixels, that were not cropped.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn encode_prompts<S: AsRef<str>>(
        &self,
        prompts: &[S],
        size: [usize; 2],
    ) -> Result<Conditioning, EncodeError> {
        let sizes = vec![SizeIds::uncropped(size.map(|side| side as u32)); prompts.len()];
        self.with_sizes(self.encode_text(prompts)?, &sizes)
    }

    /// Conditioning on no caption as the pipeline has it, one sample, for drawing images as [`Encoders::encode_prompts`] does.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn no_prompt(&self, size: [usize; 2]) -> Result<Conditioning, EncodeError> {
        let sizes = [SizeIds::uncropped(size.map(|side| side as u32))];
        self.with_sizes(self.unconditional(self.text.own_unconditional())?, &sizes)
    }

    fn encode_captions<S: AsRef<str>>(&self, captions: &[S]) -> Result<EncodedText, EncodeError> {
        self.text.encode(captions).map_err(|e| self.failed(e))
    }

    fn failed(&self, error: TextEncoderError) -> EncodeError {
        match error {
            TextEncoderError::Tokenizer(error) => error.into(),
            TextEncoderError::Tensor(error) => EncodeError::on(&self.device)(error),
        }
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
                ..EncoderOptions::exact(1)
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
