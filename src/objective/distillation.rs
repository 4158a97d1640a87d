//! Distillation by consistency along the teacher's trajectory: what the objectives share.
//!
//! Each objective compares the student's prediction from a noisy latent with its moving average's prediction from one DDIM step of
//! the guided teacher further. They differ in the point of the trajectory that is predicted.

use std::ops::Range;

use candle_core::{Result, Tensor};
use coffey_pipeline::order::rng::index_below;
use serde_json::{Map, Value, json};

use super::{Loss, Networks, StepKey, StepOutput, Trace};
use crate::diffusion::{
    DdimSolver, NoiseSchedule, conditional_and_unconditional, guidance_embedding, per_sample,
};
use crate::encode::EncodedBatch;
use crate::models::vae::sample_latents;
use crate::models::{Conditioning, Denoiser};
use crate::random::{normal, uniform};

/// Teacher's process, distance and draws of a distillation.
#[derive(Clone, Debug)]
pub struct Distillation {
    /// The teacher's forward process.
    pub schedule: NoiseSchedule,
    /// The step back along the teacher's trajectory.
    pub solver: DdimSolver,
    /// The distance that is minimised.
    pub loss: Loss,
    /// Guidance weights `w` are drawn uniformly from this range.
    pub guidance: Range<f64>,
    /// Part of the samples, 0 to 1, whose caption is replaced by the empty one.
    pub empty_prompts: f64,
    /// Conditioning on the empty caption, one sample, without size ids.
    pub empty: Conditioning,
    /// Conditioning of the teacher's unconditional pass, one sample, without size ids: on the empty caption, or zeros.
    pub unconditional: Conditioning,
    /// Factor from sampled latents to those the UNet sees (the autoencoder's `scaling_factor`).
    pub latent_scale: f64,
}

/// Inputs of a step: data and drawn numbers of `B` samples.
#[derive(Clone, Debug)]
pub struct StepInputs {
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
    /// Conditioning of the teacher's unconditional pass, `B` samples, with the same size ids.
    pub unconditional: Conditioning,
}

/// Results of a step for `B` samples, f32.
#[derive(Clone, Debug)]
pub struct StepResults {
    /// The teacher's estimate one solver step back, `[B, C, h, w]`, without a graph.
    pub x_prev: Tensor,
    /// The student's prediction, `[B, C, h, w]`, with its graph.
    pub model_pred: Tensor,
    /// The target network's prediction at `x_prev`, `[B, C, h, w]`, without a graph.
    pub target: Tensor,
    /// Their distance, a scalar with the student's graph.
    pub loss: Tensor,
}

/// Estimates of a network at noisy latents `x` of `timesteps`, one a sample.
#[derive(Clone, Copy, Debug)]
pub struct Estimate<'a> {
    /// Noisy latents, `[B, C, h, w]`.
    pub x: &'a Tensor,
    /// Timestep of each sample.
    pub timesteps: &'a [i64],
    /// The network's raw output, `[B, C, h, w]`.
    pub output: &'a Tensor,
}

impl Distillation {
    /// Draws the random numbers of a micro-batch: posterior, noise, timesteps, guidance weights, empty captions.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn draw(&self, batch: &EncodedBatch, key: &StepKey) -> Result<StepInputs> {
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
        let unconditional = Conditioning {
            size: conditioning.size.clone(),
            ..self.unconditional.repeat(b)?
        };
        Ok(StepInputs {
            latents: sample_latents(&moments, &standard_normal("posterior")?, self.latent_scale)?,
            noise: standard_normal("noise")?,
            index: (0..b)
                .map(|_| index_below(&mut timestep, self.solver.len()))
                .collect(),
            w: (0..b)
                .map(|_| uniform(&mut guidance, self.guidance.start, self.guidance.end))
                .collect(),
            conditioning: conditioning.replace_text(&empty, &self.empty)?,
            unconditional,
        })
    }

    /// Timesteps that a step starts from, and those that the teacher's step leads to, one of each a sample.
    pub fn intervals(&self, index: &[usize]) -> (Vec<i64>, Vec<i64>) {
        index.iter().map(|&i| self.solver.interval(i)).unzip()
    }

    /// Forward passes over drawn inputs. `predict` makes a prediction, `[B, C, h, w]`, of a network's output. Only the student leaves
    /// a graph behind.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(
        &self,
        networks: &Networks<'_>,
        inputs: &StepInputs,
        predict: impl Fn(Estimate<'_>) -> Result<Tensor>,
    ) -> Result<StepResults> {
        let (start, end) = self.intervals(&inputs.index);
        let noisy = self
            .schedule
            .add_noise(&inputs.latents, &inputs.noise, &start)?;
        let width = networks.student.guidance_width();
        let guidance = width
            .map(|width| guidance_embedding(&inputs.w, width, noisy.device()))
            .transpose()?;
        let conditioning = inputs.conditioning.clone().with_guidance(guidance);
        let predicted = |denoiser: &dyn Denoiser, x: &Tensor, timesteps: &[i64]| {
            let output = &denoiser.forward(x, timesteps, &conditioning)?;
            predict(Estimate {
                x,
                timesteps,
                output,
            })
        };
        let x_prev = self
            .teacher_estimate(networks.teacher, &noisy, &start, inputs)?
            .detach();
        let target = predicted(networks.target, &x_prev, &end)?.detach();
        let model_pred = predicted(networks.student, &noisy, &start)?;
        let loss = self.loss.between(&model_pred, &target)?;
        Ok(StepResults {
            x_prev,
            model_pred,
            target,
            loss,
        })
    }

    /// A step whose predictions are points of the trajectory. `destinations` gives their timesteps, one a sample, which the audit has as
    /// `name`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn step_towards(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
        name: &'static str,
        destinations: impl FnOnce(&StepInputs) -> Vec<i64>,
    ) -> Result<StepOutput> {
        let inputs = self.draw(batch, key)?;
        let destinations = destinations(&inputs);
        let results = self.forward(networks, &inputs, |estimate| {
            self.point(estimate, &destinations)
        })?;
        let mut output = Self::output(&inputs, results)?;
        output.trace = output.trace.with_timesteps(name, &destinations)?;
        Ok(output)
    }

    /// The prediction of the trajectory's point at `destination`, one timestep a sample, by one DDIM step from the estimates:
    /// `√ᾱ·x̂₀ + √(1-ᾱ)·ε̂`, `[B, C, h, w]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    fn point(&self, estimate: Estimate<'_>, destination: &[i64]) -> Result<Tensor> {
        let Estimate {
            x,
            timesteps,
            output,
        } = estimate;
        let original = self.schedule.predicted_original(output, x, timesteps)?;
        let noise = self.schedule.predicted_noise(output, x, timesteps)?;
        self.schedule.add_noise(&original, &noise, destination)
    }

    /// One DDIM step from `x` along the guided teacher's trajectory, `[B, C, h, w]`: equations 12 and 14 of the LCM paper, where
    /// the guided estimate is `cond + w·(cond - uncond)`.
    fn teacher_estimate(
        &self,
        teacher: &dyn Denoiser,
        x: &Tensor,
        timesteps: &[i64],
        inputs: &StepInputs,
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

    /// The output of a step, with the tensors that every audit has.
    ///
    /// # Errors
    /// When a tensor can't be made.
    pub fn output(inputs: &StepInputs, results: StepResults) -> Result<StepOutput> {
        let trace = Trace::default()
            .with("latents", &inputs.latents)
            .with("noise", &inputs.noise)
            .with_indices("index", &inputs.index)?
            .with_numbers("w", &inputs.w)?
            .with("prompt_embeds", &inputs.conditioning.hidden)
            .with("uncond_prompt_embeds", &inputs.unconditional.hidden)
            .with_optional("pooled_prompt_embeds", &inputs.conditioning.pooled)
            .with_optional("uncond_pooled_prompt_embeds", &inputs.unconditional.pooled)
            .with_optional("time_ids", &inputs.conditioning.size)
            .with("x_prev", &results.x_prev)
            .with("model_pred", &results.model_pred)
            .with("target", &results.target)
            .with("loss", &results.loss);
        Ok(StepOutput {
            loss: results.loss,
            trace,
        })
    }

    /// Settings that every replay needs, with those of one objective.
    pub fn describe(&self, own: Value) -> Map<String, Value> {
        let shared = json!({
            "prediction_type": self.schedule.prediction(),
            "num_train_timesteps": self.schedule.len(),
            "num_ddim_timesteps": self.solver.len(),
            "w_min": self.guidance.start,
            "w_max": self.guidance.end,
        });
        let tables = [shared, own].into_iter().filter_map(|value| match value {
            Value::Object(table) => Some(table),
            _ => None,
        });
        tables.flatten().collect()
    }
}
