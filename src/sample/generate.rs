//! Images of given prompts from given noise, as `coffey sample` draws them.

use candle_core::Tensor;
use image::RgbImage;

use super::{SampleError, decode_images};
use crate::diffusion::{
    BoundaryScaling, DdimSampler, LcmSampler, NoiseSchedule, Sampler, predictor,
};
use crate::encode::Encoders;
use crate::models::Denoiser;
use crate::random::{generator, normal};

/// Sampler of `coffey sample`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleScheduler {
    /// The multistep sampler of Latent Consistency Models.
    Lcm,
    /// DDIM over trailing timesteps.
    Ddim,
}

/// A network with all that drawing needs.
#[derive(Clone, Copy, Debug)]
pub struct Generator<'a> {
    /// The network that draws.
    pub denoiser: &'a dyn Denoiser,
    /// Text encoder and autoencoder.
    pub encoders: &'a Encoders,
    /// The network's forward process.
    pub schedule: &'a NoiseSchedule,
    /// Sampler.
    pub scheduler: SampleScheduler,
    /// Number of sampling steps.
    pub steps: usize,
    /// Guidance scale: embedded into a network that takes it, else of classifier-free guidance, which is off at 1 or less.
    pub guidance: f64,
    /// Caption that classifier-free guidance leads away from.
    pub negative_prompt: &'a str,
    /// Seed of the noise added between steps.
    pub seed: u64,
}

impl Generator<'_> {
    /// Images of `B` prompts, the first of which is number `first` of all; `noise`: `[B, C, h, w]`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn draw(
        &self,
        prompts: &[String],
        first: usize,
        noise: &Tensor,
    ) -> Result<Vec<RgbImage>, SampleError> {
        let conditioning = &self.encoders.encode_text(prompts)?;
        let unconditional = self.encoders.encode_text(&[self.negative_prompt])?;
        let unconditional = &unconditional.repeat(prompts.len())?;
        let predictor = predictor(self.denoiser, conditioning, unconditional, self.guidance);
        let mut renoise = |step| self.renoise(first, step, noise);
        let sampler: Box<dyn Sampler + '_> = match self.scheduler {
            SampleScheduler::Lcm => Box::new(LcmSampler::new(
                self.schedule,
                BoundaryScaling::default(),
                self.steps,
            )),
            SampleScheduler::Ddim => Box::new(DdimSampler::new(self.schedule, self.steps)),
        };
        let latents = sampler.sample(&*predictor, noise, &mut renoise)?;
        decode_images(self.encoders, &latents)
    }

    /// Fresh noise after a step, `[B, C, h, w]`: each prompt has its own, however prompts are batched.
    fn renoise(&self, first: usize, step: usize, like: &Tensor) -> candle_core::Result<Tensor> {
        let shape = [&[1], &like.dims()[1..]].concat();
        let each = (first..first + like.dim(0)?)
            .map(|i| {
                let mut rng = generator(self.seed, "renoise", i as u64, step as u64);
                normal(&mut rng, &shape, like.device())
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::cat(&each, 0)
    }
}
