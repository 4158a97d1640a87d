//! Captions with fixed noise, so that samples of different steps and networks can be compared.

use candle_core::{Device, Tensor};
use tokio_util::sync::CancellationToken;

use super::passes::sample_watched;
use super::{Drawn, SampleError};
use crate::diffusion::{Sampler, TeacherPredictor, predictor};
use crate::encode::Encoders;
use crate::models::{Conditioning, Denoiser};
use crate::random::{generator, normal};

/// Samples that pass the networks together.
const CHUNK: usize = 16;

/// Captions, encoded once, with the noise that each sample starts from.
#[derive(Debug)]
pub struct Prompts {
    conditioning: Conditioning,
    /// Conditioning on no caption, one sample.
    unconditional: Conditioning,
    noise: Tensor,
    seed: u64,
    purpose: &'static str,
}

/// How a network is guided.
#[derive(Clone, Copy, Debug)]
pub enum Guidance {
    /// The scale is embedded into a network that takes it; for another one as [`Guidance::ClassifierFree`].
    AsNetworkTakes(f64),
    /// The scale is embedded into a network that takes it; another one was distilled with guidance in its output, and gets none.
    Distilled(f64),
    /// Scale of classifier-free guidance, also for a network that could take it as an embedding; off at 1 or less.
    ClassifierFree(f64),
}

impl Prompts {
    /// Each caption `repeats` times. The noise of a latent, of shape `[C, h, w]`, is drawn from `seed`, `purpose` and the
    /// sample's number.
    ///
    /// # Errors
    /// When the captions can't be encoded.
    pub fn new(
        encoders: &Encoders,
        captions: &[String],
        repeats: usize,
        [c, h, w]: [usize; 3],
        seed: u64,
        purpose: &'static str,
        device: &Device,
    ) -> Result<Self, SampleError> {
        let repeated: Vec<&String> = captions
            .iter()
            .flat_map(|caption| std::iter::repeat_n(caption, repeats))
            .collect();
        let noise = (0..repeated.len())
            .map(|i| {
                let mut rng = generator(seed, purpose, i as u64, 0);
                normal(&mut rng, &[1, c, h, w], device)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        let size = [h, w].map(|side| side * encoders.vae().config().downscale());
        let encode = |captions: &[&String]| -> Result<_, SampleError> {
            Ok(encoders.encode_prompts(captions, size)?.to_device(device)?)
        };
        let conditioning = repeated
            .chunks(CHUNK)
            .map(encode)
            .collect::<Result<Vec<_>, SampleError>>()?;
        Ok(Self {
            conditioning: Conditioning::cat(&conditioning)?,
            unconditional: encoders.no_prompt(size)?.to_device(device)?,
            noise: Tensor::cat(&noise, 0)?,
            seed,
            purpose,
        })
    }

    /// Number of samples.
    pub fn count(&self) -> usize {
        self.noise.dims()[0]
    }

    /// Samples of a network, scaled latents `[count, C, h, w]`. `on_pass` is told of each pass.
    ///
    /// # Errors
    /// [`SampleError::Cancelled`] once `cancel` is cancelled; otherwise when a tensor operation fails.
    pub fn sample(
        &self,
        denoiser: &dyn Denoiser,
        guidance: Guidance,
        sampler: &dyn Sampler,
        cancel: &CancellationToken,
        on_pass: &dyn Fn(Drawn),
    ) -> Result<Tensor, SampleError> {
        let mut parts = Vec::new();
        let all = self.count().div_ceil(CHUNK) * sampler.steps();
        for from in (0..self.count()).step_by(CHUNK) {
            if cancel.is_cancelled() {
                return Err(SampleError::Cancelled);
            }
            let before = parts.len() * sampler.steps();
            let on_pass = |pass: usize, _: &Tensor| {
                let done = before + pass;
                on_pass(Drawn::Passes { done, all });
                match cancel.is_cancelled() {
                    true => Err(SampleError::Cancelled),
                    false => Ok(()),
                }
            };
            let count = CHUNK.min(self.count() - from);
            let conditioning = &self.conditioning.narrow(from, count)?;
            let noise = self.noise.narrow(0, from, count)?;
            let mut renoise = |step: usize| {
                let step = 1 + step as u64;
                let mut rng = generator(self.seed, self.purpose, from as u64, step);
                normal(&mut rng, noise.dims(), noise.device())
            };
            let unconditional = &self.unconditional.repeat(count)?;
            let predictor = match guidance {
                Guidance::AsNetworkTakes(scale) => {
                    predictor(denoiser, conditioning, unconditional, scale)
                }
                Guidance::Distilled(scale) => {
                    let width = denoiser.guidance_width();
                    let scale = width.map_or(1.0, |_| scale);
                    predictor(denoiser, conditioning, unconditional, scale)
                }
                Guidance::ClassifierFree(guidance) => Box::new(TeacherPredictor {
                    denoiser,
                    conditioning,
                    unconditional,
                    guidance,
                }),
            };
            let drawn = sample_watched(sampler, &*predictor, &noise, &mut renoise, &on_pass)?;
            parts.push(drawn);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}
