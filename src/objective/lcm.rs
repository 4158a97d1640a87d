//! Latent consistency distillation: section 20.4 of diffusers' `train_lcm_distill_sd_wds.py`; Luo et al., *Latent Consistency
//! Models*, 2023.

use std::ops::Range;

use candle_core::{Result, Tensor};
use coffey_pipeline::order::rng::index_below;
use serde_json::{Map, Value, json};

use super::{Loss, Networks, Objective, StepKey, StepOutput, Trace};
use crate::diffusion::{
    BoundaryScaling, DdimSolver, LcmSampler, NoiseSchedule, Sampler, conditional_and_unconditional,
    guidance_embedding, mix, per_sample,
};
use crate::encode::EncodedBatch;
use crate::models::vae::sample_latents;
use crate::models::{Conditioning, Denoiser};
use crate::random::{normal, uniform};

/// The distance between the student's prediction and its moving average's one DDIM step of the guided teacher further.
#[derive(Clone, Debug)]
pub struct Lcm {
    /// The teacher's forward process.
    pub schedule: NoiseSchedule,
    /// The step back along the teacher's trajectory.
    pub solver: DdimSolver,
    /// The consistency model's boundary condition.
    pub boundary: BoundaryScaling,
    /// The distance that is minimised.
    pub loss: Loss,
    /// Guidance weights `w` are drawn uniformly from this range.
    pub guidance: Range<f64>,
    /// Part of the samples, 0 to 1, whose caption is replaced by the empty one.
    pub empty_prompts: f64,
    /// Conditioning on the empty caption, one sample.
    pub unconditional: Conditioning,
    /// Factor from sampled latents to those the UNet sees (the autoencoder's `scaling_factor`).
    pub latent_scale: f64,
}

/// Inputs of a step: data and drawn numbers of `B` samples.
#[derive(Clone, Debug)]
pub struct LcmInputs {
    /// Clean scaled latents, `[B, C, h, w]` f32.
    pub latents: Tensor,
    /// Standard normal noise, `[B, C, h, w]` f32.
    pub noise: Tensor,
    /// Index into the solver's timesteps, one a sample.
    pub index: Vec<usize>,
    /// Guidance weight, one a sample.
    pub w: Vec<f64>,
    /// Conditioning on the captions, `B` samples.
    pub conditioning: Conditioning,
    /// Conditioning on the empty caption, `B` samples.
    pub unconditional: Conditioning,
}

/// Results of a step for `B` samples, f32.
#[derive(Clone, Debug)]
pub struct LcmOutputs {
    /// The teacher's estimate one solver step back, `[B, C, h, w]`, without a graph.
    pub x_prev: Tensor,
    /// The student's prediction, `[B, C, h, w]`, with its graph.
    pub model_pred: Tensor,
    /// The target network's prediction at `x_prev`, `[B, C, h, w]`, without a graph.
    pub target: Tensor,
    /// Their distance, a scalar with the student's graph.
    pub loss: Tensor,
}

impl Lcm {
    /// Draws the random numbers of a micro-batch: posterior, noise, timesteps, guidance weights, empty captions.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn draw(&self, batch: &EncodedBatch, key: &StepKey) -> Result<LcmInputs> {
        let device = self.unconditional.hidden.device();
        let moments = batch.moments.to_device(device)?;
        let (b, c, h, w) = moments.dims4()?;
        let shape = [b, c / 2, h, w];
        let standard_normal = |purpose| normal(&mut key.rng(purpose), &shape, device);
        let mut timestep = key.rng("timestep");
        let mut guidance = key.rng("guidance");
        let mut empty = key.rng("empty prompt");
        let empty: Vec<bool> = (0..b)
            .map(|_| uniform(&mut empty, 0.0, 1.0) < self.empty_prompts)
            .collect();
        let conditioning = batch.conditioning.to_device(device)?;
        Ok(LcmInputs {
            latents: sample_latents(&moments, &standard_normal("posterior")?, self.latent_scale)?,
            noise: standard_normal("noise")?,
            index: (0..b)
                .map(|_| index_below(&mut timestep, self.solver.len()))
                .collect(),
            w: (0..b)
                .map(|_| uniform(&mut guidance, self.guidance.start, self.guidance.end))
                .collect(),
            conditioning: conditioning.replace_text(&empty, &self.unconditional)?,
            unconditional: self.unconditional.repeat(b)?,
        })
    }

    /// Forward passes over drawn inputs. Only the student leaves a graph behind.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, networks: &Networks<'_>, inputs: &LcmInputs) -> Result<LcmOutputs> {
        let (start, end): (Vec<i64>, Vec<i64>) = inputs
            .index
            .iter()
            .map(|&i| self.solver.interval(i))
            .unzip();
        let noisy = self
            .schedule
            .add_noise(&inputs.latents, &inputs.noise, &start)?;
        let width = networks.student.guidance_width();
        let guidance = width
            .map(|width| guidance_embedding(&inputs.w, width, noisy.device()))
            .transpose()?;
        let conditioning = inputs.conditioning.clone().with_guidance(guidance);
        let x_prev = self
            .teacher_estimate(networks.teacher, &noisy, &start, inputs)?
            .detach();
        let target = self
            .consistency(networks.target, &x_prev, &end, &conditioning)?
            .detach();
        let model_pred = self.consistency(networks.student, &noisy, &start, &conditioning)?;
        let loss = self.loss.between(&model_pred, &target)?;
        Ok(LcmOutputs {
            x_prev,
            model_pred,
            target,
            loss,
        })
    }

    /// The consistency function `f(x, t) = c_skip·x + c_out·x̂₀`, `[B, C, h, w]`.
    fn consistency(
        &self,
        denoiser: &dyn Denoiser,
        x: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let output = denoiser.forward(x, timesteps, conditioning)?;
        let original = self.schedule.predicted_original(&output, x, timesteps)?;
        let (skip, out) = self.boundary.each(timesteps);
        mix(&skip, x, &out, &original)
    }

    /// One DDIM step from `x` along the guided teacher's trajectory, `[B, C, h, w]`: equations 12 and 14 of the LCM paper, where
    /// the guided estimate is `cond + w·(cond - uncond)`.
    fn teacher_estimate(
        &self,
        teacher: &dyn Denoiser,
        x: &Tensor,
        timesteps: &[i64],
        inputs: &LcmInputs,
    ) -> Result<Tensor> {
        let (on_captions, on_empty) = (&inputs.conditioning, &inputs.unconditional);
        let (cond, uncond) =
            conditional_and_unconditional(teacher, x, timesteps, on_captions, on_empty)?;
        let estimate = |output: &Tensor| -> Result<(Tensor, Tensor)> {
            Ok((
                self.schedule.predicted_original(output, x, timesteps)?,
                self.schedule.predicted_noise(output, x, timesteps)?,
            ))
        };
        let (cond_original, cond_noise) = estimate(&cond)?;
        let (uncond_original, uncond_noise) = estimate(&uncond)?;
        let w = per_sample(&inputs.w, x)?;
        let guide = |cond: &Tensor, uncond: &Tensor| cond + (cond - uncond)?.broadcast_mul(&w)?;
        self.solver.step(
            &guide(&cond_original, &uncond_original)?,
            &guide(&cond_noise, &uncond_noise)?,
            &inputs.index,
        )
    }
}

impl Objective for Lcm {
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput> {
        let inputs = self.draw(batch, key)?;
        let outputs = self.forward(networks, &inputs)?;
        let trace = Trace::default()
            .with("latents", &inputs.latents)
            .with("noise", &inputs.noise)
            .with_indices("index", &inputs.index)?
            .with_numbers("w", &inputs.w)?
            .with("prompt_embeds", &inputs.conditioning.hidden)
            .with("uncond_prompt_embeds", &inputs.unconditional.hidden)
            .with("x_prev", &outputs.x_prev)
            .with("model_pred", &outputs.model_pred)
            .with("target", &outputs.target)
            .with("loss", &outputs.loss);
        Ok(StepOutput {
            loss: outputs.loss,
            trace,
        })
    }

    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_> {
        Box::new(LcmSampler::new(&self.schedule, self.boundary, steps))
    }

    fn describe(&self) -> Map<String, Value> {
        let settings = json!({
            "prediction_type": self.schedule.prediction(),
            "num_train_timesteps": self.schedule.len(),
            "num_ddim_timesteps": self.solver.len(),
            "timestep_scaling": self.boundary.timestep_scaling,
            "sigma_data": self.boundary.sigma_data,
            "w_min": self.guidance.start,
            "w_max": self.guidance.end,
        });
        match settings {
            Value::Object(settings) => settings,
            _ => Map::new(),
        }
    }
}
