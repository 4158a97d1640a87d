//! Images of given prompts from given noise, as `coffey sample` draws them.

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::passes::sample_watched;
use super::{Intermediate, SampleError, decode_images};
use crate::diffusion::{
    BoundaryScaling, DdimSampler, LcmSampler, NoiseSchedule, Sampler, TcdSampler, predictor,
};
use crate::encode::Encoders;
use crate::models::Denoiser;
use crate::random::{generator, normal};

/// Sampler of `coffey sample`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SampleScheduler {
    /// The multistep sampler of Latent Consistency Models.
    Lcm,
    /// DDIM over trailing timesteps.
    Ddim,
    /// The sampler of trajectory consistency models.
    Tcd {
        /// Stochasticity, 0 to 1.
        gamma: f64,
    },
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
    /// Caption that classifier-free guidance leads away from; without one the pipeline's own conditioning on no caption.
    pub negative_prompt: Option<&'a str>,
    /// Seed of the first image; image `i` has this seed plus `i`.
    pub seed: u64,
}

impl Generator<'_> {
    /// The noise that image `index` starts from: `[1, C, h, w]` for latents of the shape `[C, h, w]`.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn noise(
        &self,
        index: usize,
        latent: [usize; 3],
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let [c, h, w] = latent;
        let mut rng = generator(self.seed_of(index), "sample", 0, 0);
        normal(&mut rng, &[1, c, h, w], device)
    }

    /// Image `index`, of `prompt`, from `noise`, `[1, C, h, w]`. Images are drawn one by one: an image does not depend on the others,
    /// and memory not on their number. `on_step` is told of each step that is made, from 1.
    ///
    /// # Errors
    /// When a tensor operation fails, or a result is not finite.
    pub fn draw(
        &self,
        prompt: &str,
        index: usize,
        noise: &Tensor,
        on_step: &dyn Fn(usize),
    ) -> Result<RgbImage, SampleError> {
        let encoders = self.encoders;
        let (_, _, height, width) = noise.dims4()?;
        let size = [height, width].map(|side| side * encoders.vae().config().downscale());
        let conditioning = &encoders.encode_prompts(&[prompt], size)?;
        let unconditional = &match self.negative_prompt {
            Some(negative) => encoders.encode_prompts(&[negative], size)?,
            None => encoders.no_prompt(size)?,
        };
        for text in [conditioning, unconditional] {
            Intermediate::Text.check(&text.hidden)?;
            if let Some(pooled) = &text.pooled {
                Intermediate::Text.check(pooled)?;
            }
        }
        let predictor = predictor(self.denoiser, conditioning, unconditional, self.guidance);
        let mut renoise = |step| {
            let mut rng = generator(self.seed_of(index), "renoise", 0, step as u64);
            normal(&mut rng, noise.dims(), noise.device())
        };
        let sampler: Box<dyn Sampler + '_> = match self.scheduler {
            SampleScheduler::Lcm => Box::new(LcmSampler::new(
                self.schedule,
                BoundaryScaling::default(),
                self.steps,
            )),
            SampleScheduler::Ddim => Box::new(DdimSampler::new(self.schedule, self.steps)),
            SampleScheduler::Tcd { gamma } => {
                Box::new(TcdSampler::new(self.schedule, gamma, self.steps))
            }
        };
        let on_pass = |step: usize, output: &Tensor| {
            Intermediate::Prediction { step }.check(output)?;
            on_step(step);
            Ok(())
        };
        let latents = sample_watched(&*sampler, &*predictor, noise, &mut renoise, &on_pass)?;
        Intermediate::Latents.check(&latents)?;
        let images = decode_images(self.encoders, &latents, &|_| ())?;
        match images.into_iter().next() {
            Some(image) => Ok(image),
            None => Err(candle_core::Error::msg("noise of no image").into()),
        }
    }

    fn seed_of(&self, index: usize) -> u64 {
        self.seed.wrapping_add(index as u64)
    }
}
