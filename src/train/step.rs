//! One step of latent consistency distillation, as section 20.4 of `train_lcm_distill_sd_wds.py`.

use candle_core::{Result, Tensor};

use crate::diffusion::{
    BoundaryScaling, DdimSolver, NoiseSchedule, guidance_embedding, mix, per_sample,
};
use crate::models::{Conditioning, UNet};

/// The distance between the student's and the target's prediction.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// Pseudo-Huber: `mean(√(d² + c²) - c)`.
    Huber {
        /// Where the loss turns from quadratic to linear.
        c: f64,
    },
    /// `mean(d²)`.
    L2,
}

impl Loss {
    fn between(self, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        let square = (prediction - target)?.sqr()?;
        match self {
            Self::Huber { c } => ((square + c * c)?.sqrt()? - c)?.mean_all(),
            Self::L2 => square.mean_all(),
        }
    }
}

/// What a step draws and reads; `B` samples.
#[derive(Clone, Debug)]
pub struct StepInputs {
    /// Clean scaled latents, `[B, C, h, w]`.
    pub latents: Tensor,
    /// Standard normal noise, `[B, C, h, w]`.
    pub noise: Tensor,
    /// Index into the solver's timesteps, one a sample.
    pub index: Vec<usize>,
    /// Guidance weight, one a sample.
    pub w: Vec<f64>,
    /// Text embeddings, `[B, T, width]`.
    pub prompt_embeds: Tensor,
    /// Embeddings of the empty caption, `[B, T, width]`.
    pub uncond_prompt_embeds: Tensor,
}

/// What a step makes; `loss` carries the student's graph.
#[derive(Clone, Debug)]
pub struct StepOutputs {
    /// The teacher's estimate one solver step back, `[B, C, h, w]`.
    pub x_prev: Tensor,
    /// The student's prediction, `[B, C, h, w]`.
    pub model_pred: Tensor,
    /// What it should be: the target network's prediction at `x_prev`.
    pub target: Tensor,
    /// Their distance, a scalar.
    pub loss: Tensor,
}

/// The pieces a step is made of.
#[derive(Clone, Debug)]
pub struct Distillation {
    /// The teacher's forward process.
    pub schedule: NoiseSchedule,
    /// The step back along the teacher's trajectory.
    pub solver: DdimSolver,
    /// The consistency model's boundary condition.
    pub boundary: BoundaryScaling,
    /// The distance that is minimised.
    pub loss: Loss,
}

impl Distillation {
    /// Forward pass of one micro-batch. Only `student` leaves a graph behind.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(
        &self,
        student: &UNet,
        target: &UNet,
        teacher: &UNet,
        inputs: &StepInputs,
    ) -> Result<StepOutputs> {
        let (start, end): (Vec<i64>, Vec<i64>) = inputs
            .index
            .iter()
            .map(|&i| self.solver.interval(i))
            .unzip();
        let noisy = self
            .schedule
            .add_noise(&inputs.latents, &inputs.noise, &start)?;
        let width = student.config().time_cond_proj_dim;
        let guidance = width
            .map(|width| guidance_embedding(&inputs.w, width, noisy.device()))
            .transpose()?;
        let conditioning = Conditioning {
            prompt_embeds: inputs.prompt_embeds.clone(),
            guidance_embedding: guidance,
        };
        let x_prev = self
            .teacher_estimate(teacher, &noisy, &start, inputs)?
            .detach();
        let target = self
            .consistency(target, &x_prev, &end, &conditioning)?
            .detach();
        let model_pred = self.consistency(student, &noisy, &start, &conditioning)?;
        let loss = self.loss.between(&model_pred, &target)?;
        Ok(StepOutputs {
            x_prev,
            model_pred,
            target,
            loss,
        })
    }

    /// The consistency function `f(x, t) = c_skip·x + c_out·x̂₀`.
    fn consistency(
        &self,
        unet: &UNet,
        x: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let output = unet.forward(x, timesteps, conditioning)?;
        let original = self.schedule.predicted_original(&output, x, timesteps)?;
        let (skip, out) = self.boundary.each(timesteps);
        mix(&skip, x, &out, &original)
    }

    /// One DDIM step from `x` along the guided teacher's trajectory: equations 12 and 14 of the LCM paper, where the guided
    /// estimate is `cond + w·(cond - uncond)`.
    fn teacher_estimate(
        &self,
        teacher: &UNet,
        x: &Tensor,
        timesteps: &[i64],
        inputs: &StepInputs,
    ) -> Result<Tensor> {
        let estimate = |embeds: &Tensor| -> Result<(Tensor, Tensor)> {
            let conditioning = Conditioning {
                prompt_embeds: embeds.clone(),
                guidance_embedding: None,
            };
            let output = teacher.forward(x, timesteps, &conditioning)?;
            Ok((
                self.schedule.predicted_original(&output, x, timesteps)?,
                self.schedule.predicted_noise(&output, x, timesteps)?,
            ))
        };
        let (cond_original, cond_noise) = estimate(&inputs.prompt_embeds)?;
        let (uncond_original, uncond_noise) = estimate(&inputs.uncond_prompt_embeds)?;
        let w = per_sample(&inputs.w, x)?;
        let guide = |cond: &Tensor, uncond: &Tensor| cond + (cond - uncond)?.broadcast_mul(&w)?;
        self.solver.step(
            &guide(&cond_original, &uncond_original)?,
            &guide(&cond_noise, &uncond_noise)?,
            &inputs.index,
        )
    }
}
