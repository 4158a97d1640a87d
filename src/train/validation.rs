//! Drawing from students and teachers while training: latents from fixed noise, decoded to images.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::TrainError;
use crate::diffusion::{
    BoundaryScaling, DdimSampler, LcmSampler, NoiseSchedule, StudentPredictor, TeacherPredictor,
};
use crate::draw::pixels_to_images;
use crate::encode::Encoders;
use crate::models::UNet;
use crate::random::{generator, normal};
use crate::stop::Stop;

/// Samples that are drawn together.
const CHUNK: usize = 16;

/// Fixed prompts with fixed noise, so that what is drawn at different steps can be compared.
#[derive(Debug)]
pub(super) struct Prompts {
    embeds: Tensor,
    noise: Tensor,
    seed: u64,
    purpose: &'static str,
}

impl Prompts {
    /// Each prompt `repeats` times; `latent` is the shape of one latent, `[C, h, w]`.
    pub(super) fn new(
        encoders: &Encoders,
        captions: &[String],
        repeats: usize,
        latent: [usize; 3],
        (seed, purpose): (u64, &'static str),
        device: &Device,
    ) -> Result<Self, TrainError> {
        let repeated: Vec<&String> = captions
            .iter()
            .flat_map(|c| std::iter::repeat_n(c, repeats))
            .collect();
        let [c, h, w] = latent;
        let noise = (0..repeated.len())
            .map(|i| {
                normal(
                    &mut generator(seed, purpose, i as u64, 0),
                    &[1, c, h, w],
                    device,
                )
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let embeds = repeated
            .chunks(CHUNK)
            .map(|captions| Ok(encoders.encode_text(captions)?.to_device(device)?))
            .collect::<Result<Vec<_>, TrainError>>()?;
        Ok(Self {
            embeds: Tensor::cat(&embeds, 0)?,
            noise: Tensor::cat(&noise, 0)?,
            seed,
            purpose,
        })
    }

    /// Number of samples.
    pub(super) fn len(&self) -> usize {
        self.noise.dims()[0]
    }

    /// Runs `draw` on a few samples at a time, until a stop is asked for.
    fn chunked(
        &self,
        stop: &Stop,
        draw: impl Fn(usize, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor, TrainError> {
        let mut parts = Vec::new();
        for from in (0..self.len()).step_by(CHUNK) {
            if stop.asked() {
                return Err(TrainError::Stopped);
            }
            let count = CHUNK.min(self.len() - from);
            parts.push(draw(
                from,
                &self.embeds.narrow(0, from, count)?,
                &self.noise.narrow(0, from, count)?,
            )?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// A student's samples, scaled latents.
    pub(super) fn student(
        &self,
        unet: &UNet,
        schedule: &NoiseSchedule,
        boundary: BoundaryScaling,
        (steps, guidance): (usize, f64),
        stop: &Stop,
    ) -> Result<Tensor, TrainError> {
        let sampler = LcmSampler::new(schedule, boundary, steps);
        self.chunked(stop, |from, embeds, noise| {
            let predictor = StudentPredictor {
                unet,
                prompt_embeds: embeds,
                guidance,
            };
            sampler.sample(&predictor, noise, |step| {
                let mut rng = generator(self.seed, self.purpose, from as u64, 1 + step as u64);
                normal(&mut rng, noise.dims(), noise.device())
            })
        })
    }

    /// A teacher's samples by DDIM over trailing timesteps, scaled latents.
    pub(super) fn teacher(
        &self,
        unet: &UNet,
        uncond: &Tensor,
        schedule: &NoiseSchedule,
        (steps, guidance): (usize, f64),
        stop: &Stop,
    ) -> Result<Tensor, TrainError> {
        let sampler = DdimSampler::new(schedule, steps);
        self.chunked(stop, |_, embeds, noise| {
            let b = noise.dim(0)?;
            let uncond = uncond
                .broadcast_as((b, uncond.dim(1)?, uncond.dim(2)?))?
                .contiguous()?;
            let predictor = TeacherPredictor {
                unet,
                prompt_embeds: embeds,
                uncond_prompt_embeds: &uncond,
                guidance,
            };
            sampler.sample(&predictor, noise)
        })
    }
}

/// Images of scaled latents.
pub(super) fn decode(encoders: &Encoders, latents: &Tensor) -> Result<Vec<RgbImage>, TrainError> {
    let vae = encoders.vae();
    let mut images = Vec::new();
    for from in (0..latents.dim(0)?).step_by(CHUNK) {
        let part = latents.narrow(0, from, CHUNK.min(latents.dim(0)? - from))?;
        let part = (part.to_device(encoders.device())?.to_dtype(DType::F32)?
            * (1.0 / vae.config().scaling_factor))?;
        images.extend(pixels_to_images(&vae.decode(&part)?)?);
    }
    Ok(images)
}
