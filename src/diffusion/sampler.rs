//! Samplers, DDIM and that of Latent Consistency Models, and the two kinds of guidance.

use std::fmt;

use candle_core::{Result, Tensor};

use super::{BoundaryScaling, NoiseSchedule, conditional_and_unconditional, guidance_embedding};
use crate::models::{Conditioning, Denoiser};

/// From noise to latents in a fixed number of steps.
pub trait Sampler: fmt::Debug {
    /// Number of steps, each of which asks the predictor once.
    fn steps(&self) -> usize;

    /// From standard normal noise `[B, C, h, w]` to scaled latents of that shape. A stochastic sampler asks `renoise(i)` for
    /// the noise it adds after step `i`, of the same shape; a deterministic one never does.
    ///
    /// # Errors
    /// When the predictor or `renoise` fails.
    fn sample(
        &self,
        predictor: &dyn NoisePredictor,
        noise: &Tensor,
        renoise: &mut dyn FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor>;
}

/// A network with its conditioning, asked for its raw output at one timestep for the whole batch.
pub trait NoisePredictor {
    /// Output for noisy latents `[B, C, h, w]` at `timestep`, of the same shape.
    ///
    /// # Errors
    /// When the latents do not fit the network.
    fn predict(&self, latents: &Tensor, timestep: i64) -> Result<Tensor>;
}

/// A network under a guidance scale. As in diffusers' pipelines, the scale is embedded into a network that takes it
/// ([`StudentPredictor`]); for another one it is that of classifier-free guidance ([`TeacherPredictor`]).
///
/// `conditioning` and `unconditional`: on the captions and on empty captions, `B` samples each.
pub fn predictor<'a>(
    denoiser: &'a dyn Denoiser,
    conditioning: &'a Conditioning,
    unconditional: &'a Conditioning,
    guidance: f64,
) -> Box<dyn NoisePredictor + 'a> {
    match denoiser.guidance_width() {
        Some(_) => Box::new(StudentPredictor {
            denoiser,
            conditioning,
            guidance,
        }),
        None => Box::new(TeacherPredictor {
            denoiser,
            conditioning,
            unconditional,
            guidance,
        }),
    }
}

/// A network under classifier-free guidance: `uncond + scale·(cond - uncond)`.
#[derive(Debug)]
pub struct TeacherPredictor<'a> {
    /// The network.
    pub denoiser: &'a dyn Denoiser,
    /// Conditioning on the captions, `B` samples.
    pub conditioning: &'a Conditioning,
    /// Conditioning on empty captions, `B` samples.
    pub unconditional: &'a Conditioning,
    /// Guidance scale; 1 or less turns guidance off.
    pub guidance: f64,
}

impl NoisePredictor for TeacherPredictor<'_> {
    fn predict(&self, latents: &Tensor, timestep: i64) -> Result<Tensor> {
        let timesteps = vec![timestep; latents.dim(0)?];
        let (denoiser, conditioning) = (self.denoiser, self.conditioning);
        if self.guidance <= 1.0 {
            return denoiser.forward(latents, &timesteps, conditioning);
        }
        let (cond, uncond) = conditional_and_unconditional(
            denoiser,
            latents,
            &timesteps,
            conditioning,
            self.unconditional,
        )?;
        &uncond + ((cond - &uncond)? * self.guidance)?
    }
}

/// A student, with the guidance scale embedded. As diffusers' `LatentConsistencyModelPipeline`, the weight that is embedded is
/// the scale minus one.
#[derive(Debug)]
pub struct StudentPredictor<'a> {
    /// The student.
    pub denoiser: &'a dyn Denoiser,
    /// Conditioning on the captions, `B` samples.
    pub conditioning: &'a Conditioning,
    /// Guidance scale.
    pub guidance: f64,
}

impl NoisePredictor for StudentPredictor<'_> {
    fn predict(&self, latents: &Tensor, timestep: i64) -> Result<Tensor> {
        let b = latents.dim(0)?;
        let width = self.denoiser.guidance_width();
        let embedding =
            width.map(|w| guidance_embedding(&vec![self.guidance - 1.0; b], w, latents.device()));
        let conditioning = self
            .conditioning
            .clone()
            .with_guidance(embedding.transpose()?);
        self.denoiser
            .forward(latents, &vec![timestep; b], &conditioning)
    }
}

/// DDIM (η = 0) over trailing timesteps. As `DDIMScheduler(timestep_spacing="trailing")`.
#[derive(Debug)]
pub struct DdimSampler<'a> {
    schedule: &'a NoiseSchedule,
    timesteps: Vec<i64>,
}

impl<'a> DdimSampler<'a> {
    /// A sampler with `steps` steps, at least one.
    pub fn new(schedule: &'a NoiseSchedule, steps: usize) -> Self {
        let (n, steps) = (schedule.len() as f64, steps.max(1));
        let stride = n / steps as f64;
        Self {
            timesteps: (0..steps)
                .map(|i| (n - i as f64 * stride).round_ties_even() as i64 - 1)
                .collect(),
            schedule,
        }
    }

    fn step(&self, output: &Tensor, x: &Tensor, t: i64, previous: i64) -> Result<Tensor> {
        let each = vec![t; x.dim(0)?];
        let original = self.schedule.predicted_original(output, x, &each)?;
        let noise = self.schedule.predicted_noise(output, x, &each)?;
        let alpha = self.schedule.alpha_cumprod(previous);
        (original * alpha.sqrt())? + (noise * (1.0 - alpha).sqrt())?
    }
}

impl Sampler for DdimSampler<'_> {
    fn steps(&self) -> usize {
        self.timesteps.len()
    }

    fn sample(
        &self,
        predictor: &dyn NoisePredictor,
        noise: &Tensor,
        _renoise: &mut dyn FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let stride = (self.schedule.len() / self.timesteps.len()) as i64;
        let mut x = noise.clone();
        for &t in &self.timesteps {
            let output = predictor.predict(&x, t)?;
            x = self.step(&output, &x, t, t - stride)?;
        }
        Ok(x)
    }
}

/// The multistep sampler of Latent Consistency Models. As `LCMScheduler` with 50 original inference steps.
#[derive(Debug)]
pub struct LcmSampler<'a> {
    schedule: &'a NoiseSchedule,
    boundary: BoundaryScaling,
    timesteps: Vec<i64>,
}

impl<'a> LcmSampler<'a> {
    /// The timesteps a student is distilled on, of which a sampler takes a subset.
    pub const ORIGINAL_STEPS: usize = 50;

    /// A sampler with `steps` steps, 1 to [`Self::ORIGINAL_STEPS`].
    pub fn new(schedule: &'a NoiseSchedule, boundary: BoundaryScaling, steps: usize) -> Self {
        let steps = steps.clamp(1, Self::ORIGINAL_STEPS);
        let stride = schedule.len() / Self::ORIGINAL_STEPS;
        let index = |i: usize| i * Self::ORIGINAL_STEPS / steps;
        Self {
            timesteps: (0..steps)
                .map(|i| ((Self::ORIGINAL_STEPS - index(i)) * stride) as i64 - 1)
                .collect(),
            schedule,
            boundary,
        }
    }

    /// Timesteps of the steps, descending.
    pub(super) fn timesteps(&self) -> &[i64] {
        &self.timesteps
    }

    fn denoise(&self, output: &Tensor, x: &Tensor, t: i64) -> Result<Tensor> {
        let original = self
            .schedule
            .predicted_original(output, x, &vec![t; x.dim(0)?])?;
        let (skip, out) = self.boundary.at(t);
        (x * skip)? + (original * out)?
    }
}

impl Sampler for LcmSampler<'_> {
    fn steps(&self) -> usize {
        self.timesteps.len()
    }

    fn sample(
        &self,
        predictor: &dyn NoisePredictor,
        noise: &Tensor,
        renoise: &mut dyn FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = noise.clone();
        for (i, &t) in self.timesteps.iter().enumerate() {
            let output = predictor.predict(&x, t)?;
            let denoised = self.denoise(&output, &x, t)?;
            x = match self.timesteps.get(i + 1) {
                Some(&next) => {
                    let each = vec![next; x.dim(0)?];
                    self.schedule.add_noise(&denoised, &renoise(i)?, &each)?
                }
                None => denoised,
            };
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Prediction;
    use super::super::golden;
    use super::super::schedule::tests::{scaled_linear_schedule, with};
    use super::*;

    #[test]
    fn timesteps_equal_diffusers() {
        let schedule = scaled_linear_schedule();
        let golden = golden::load();
        let as_numbers = |t: &[i64]| t.iter().map(|&t| t as f64).collect::<Vec<_>>();
        for (steps, want) in golden["lcm"]["timesteps"].as_object().unwrap() {
            let sampler = LcmSampler::new(
                &schedule,
                BoundaryScaling::default(),
                steps.parse().unwrap(),
            );
            golden::assert_close(&as_numbers(&sampler.timesteps), want, 0.0);
        }
        for (steps, want) in golden["ddim_trailing"]["timesteps"].as_object().unwrap() {
            let sampler = DdimSampler::new(&schedule, steps.parse().unwrap());
            golden::assert_close(&as_numbers(&sampler.timesteps), want, 0.0);
        }
    }

    #[test]
    fn steps_equal_diffusers() -> Result<()> {
        let golden = golden::load();
        for (name, prediction) in [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::VPrediction),
        ] {
            let schedule = with(&scaled_linear_schedule(), prediction, true);
            let lcm = &golden["lcm"][name];
            let sampler = LcmSampler::new(&schedule, BoundaryScaling::default(), 4);
            let mut x = row(&lcm["start"]);
            for (i, step) in lcm["steps"].as_array().unwrap().iter().enumerate() {
                let denoised = sampler.denoise(&row(&step["output"]), &x, sampler.timesteps[i])?;
                golden::assert_close(&golden::flat(&denoised), &step["denoised"], 1e-5);
                x = row(&step["prev"]);
                if let Some(&next) = sampler.timesteps.get(i + 1) {
                    let noisy = schedule.add_noise(&denoised, &row(&step["noise"]), &[next])?;
                    golden::assert_close(&golden::flat(&noisy), &step["prev"], 1e-5);
                }
            }
            for (end, to_one) in [("alpha_one", true), ("first_alpha", false)] {
                let schedule = with(&schedule, prediction, to_one);
                let ddim = &golden["ddim_trailing"][format!("{name}.{end}")];
                let sampler = DdimSampler::new(&schedule, 4);
                let mut x = row(&ddim["start"]);
                for (step, &t) in ddim["steps"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .zip(&sampler.timesteps)
                {
                    let next = sampler.step(&row(&step["output"]), &x, t, t - 250)?;
                    golden::assert_close(&golden::flat(&next), &step["prev"], 1e-5);
                    x = row(&step["prev"]);
                }
            }
        }
        Ok(())
    }

    fn row(value: &serde_json::Value) -> Tensor {
        golden::tensor(&serde_json::json!([value]))
    }
}
