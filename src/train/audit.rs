//! The audit folder: what the first steps saw and made, so that anyone can replay them.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::Destination;
use serde_json::json;

use super::checkpoint::write_model;
use super::data::Data;
use super::{Distillation, StepInputs, StepOutputs, Student, TrainError};
use crate::config::{Audit, Config};
use crate::models::write_safetensors;

/// Writes `step-NNNNNN.MM.safetensors` for the first steps of a run, and the student before and after them.
#[derive(Debug)]
pub(super) struct Auditor {
    folder: Destination,
    steps: u64,
}

impl Auditor {
    /// Starts an audit: `meta.json` and `unet_init/`.
    pub(super) fn start(
        audit: &Audit,
        config: &Config,
        distillation: &Distillation,
        student: &Student,
        data: &Data<'_>,
    ) -> Result<Self, TrainError> {
        let Config {
            distill,
            optimizer,
            train,
            ..
        } = config;
        let meta = json!({
            "teacher": config.model.teacher,
            "steps": audit.steps.min(train.max_steps),
            "prediction_type": distillation.schedule.prediction(),
            "num_train_timesteps": distillation.schedule.len(),
            "num_ddim_timesteps": distill.num_ddim_timesteps,
            "timestep_scaling": distill.timestep_scaling,
            "sigma_data": distillation.boundary.sigma_data,
            "loss": distill.loss,
            "huber_c": distill.huber_c,
            "w_min": distill.w_min,
            "w_max": distill.w_max,
            "ema_decay": distill.ema_decay,
            "time_cond_proj_dim": student.unet().config().time_cond_proj_dim,
            "learning_rate": optimizer.learning_rate,
            "schedule": optimizer.schedule,
            "warmup_steps": optimizer.warmup_steps,
            "beta1": optimizer.beta1,
            "beta2": optimizer.beta2,
            "epsilon": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay,
            "max_grad_norm": optimizer.max_grad_norm,
            "optimizer": optimizer.kind,
            "mixed_precision": train.mixed_precision,
            "gradient_accumulation": train.gradient_accumulation,
            "batch_size": train.batch_size,
            "max_steps": train.max_steps,
            "seed": train.seed,
            "teacher_dtype": train.teacher_dtype,
        });
        let folder = (data.destination)(&audit.dir.to_string_lossy())?;
        folder.write("meta.json", format!("{meta:#}\n").as_bytes())?;
        let model = student.unet().config().to_json();
        write_model(&folder, "unet_init/", model, &student.online())?;
        Ok(Self {
            folder,
            steps: audit.steps.min(train.max_steps),
        })
    }

    /// Whether this step is audited.
    pub(super) fn covers(&self, step: u64) -> bool {
        step <= self.steps
    }

    /// Writes a micro-batch. `end_of_step` holds the gradient norm before clipping and the learning rate, in a step's last one.
    pub(super) fn record(
        &self,
        (step, micro): (u64, usize),
        inputs: &StepInputs,
        outputs: &StepOutputs,
        end_of_step: Option<(f64, f64)>,
    ) -> Result<(), TrainError> {
        let cpu = &Device::Cpu;
        let full = |t: &Tensor| {
            t.detach()
                .to_dtype(DType::F32)?
                .to_device(cpu)?
                .contiguous()
        };
        let index: Vec<i64> = inputs.index.iter().map(|&i| i as i64).collect();
        let w: Vec<f32> = inputs.w.iter().map(|&w| w as f32).collect();
        let mut tensors = BTreeMap::from([
            ("latents", full(&inputs.latents)?),
            ("noise", full(&inputs.noise)?),
            ("index", Tensor::from_vec(index, inputs.index.len(), cpu)?),
            ("w", Tensor::from_vec(w, inputs.w.len(), cpu)?),
            ("prompt_embeds", full(&inputs.prompt_embeds)?),
            ("uncond_prompt_embeds", full(&inputs.uncond_prompt_embeds)?),
            ("x_prev", full(&outputs.x_prev)?),
            ("model_pred", full(&outputs.model_pred)?),
            ("target", full(&outputs.target)?),
            ("loss", full(&outputs.loss)?),
        ]);
        if let Some((norm, rate)) = end_of_step {
            tensors.insert("grad_norm", Tensor::new(norm as f32, cpu)?);
            tensors.insert("lr", Tensor::new(rate as f32, cpu)?);
        }
        let name = format!("step-{step:06}.{micro:02}.safetensors");
        let mut writer = self.folder.create(&name)?;
        let named = tensors.iter().map(|(name, t)| (*name, t));
        write_safetensors(&mut writer, named, None).map_err(|e| self.folder.failed(&name, e))?;
        writer.finish()?;
        Ok(())
    }

    /// After the last audited step: `unet_final/` and `unet_target_final/`.
    pub(super) fn end_of_step(&self, step: u64, student: &Student) -> Result<(), TrainError> {
        if step == self.steps {
            let model = student.unet().config().to_json();
            write_model(&self.folder, "unet_final/", model, &student.online())?;
            write_model(
                &self.folder,
                "unet_target_final/",
                model,
                &student.average(),
            )?;
        }
        Ok(())
    }
}
