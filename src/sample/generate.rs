//! Images of given prompts from given noise, as `coffey sample` draws them.

use candle_core::Tensor;
use image::RgbImage;

use super::{SampleError, decode_images};
use crate::diffusion::{
    BoundaryScaling, DdimSampler, LcmSampler, NoiseSchedule, Sampler, StudentPredictor,
    TeacherPredictor,
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
    /// Guidance scale: embedded into a student; for a teacher classifier-free guidance.
    pub guidance: f64,
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
        let student = StudentPredictor {
            denoiser: self.denoiser,
            conditioning,
            guidance: self.guidance,
        };
        let mut renoise = |step| self.renoise(first, step, noise);
        let sampler: Box<dyn Sampler + '_> = match self.scheduler {
            SampleScheduler::Lcm => Box::new(LcmSampler::new(
                self.schedule,
                BoundaryScaling::default(),
                self.steps,
            )),
            SampleScheduler::Ddim => Box::new(DdimSampler::new(self.schedule, self.steps)),
        };
        let is_student = self.denoiser.guidance_width().is_some();
        let latents = if is_student || self.scheduler == SampleScheduler::Lcm {
            sampler.sample(&student, noise, &mut renoise)?
        } else {
            let teacher = TeacherPredictor {
                denoiser: self.denoiser,
                conditioning,
                unconditional: &self.encoders.encode_text(&vec![""; prompts.len()])?,
                guidance: self.guidance,
            };
            sampler.sample(&teacher, noise, &mut renoise)?
        };
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
