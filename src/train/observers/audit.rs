//! The audit folder: inputs and results of the first steps, so that anyone can replay them.

use candle_core::{Device, Tensor};
use coffey_pipeline::Destination;
use serde_json::{Value, json};

use super::{Earlier, Observer, RunView, StepReport};
use crate::adaptation::{Adaptation, AuditMoment};
use crate::config::Config;
use crate::models::write_safetensors;
use crate::objective::Objective;
use crate::params::Tensors;
use crate::train::TrainError;
use crate::train::checkpoint::write_folder;

/// Writes `step-NNNNNN.MM.safetensors` for the first steps of a run, and the student before and after them.
#[derive(Debug)]
pub(in crate::train) struct AuditWriter {
    folder: Destination,
    /// Number of audited steps.
    steps: u64,
}

impl AuditWriter {
    /// Starts an audit of `steps` steps in `folder`: writes `meta.json` and `unet_init/`.
    pub(in crate::train) fn start(
        folder: Destination,
        steps: u64,
        config: &Config,
        objective: &dyn Objective,
        student: &dyn Adaptation,
    ) -> Result<Self, TrainError> {
        let meta = meta(config, steps, objective, student);
        folder.write("meta.json", format!("{meta:#}\n").as_bytes())?;
        let audit = Self { folder, steps };
        audit.write_student(student, AuditMoment::Init)?;
        Ok(audit)
    }

    fn write_student(
        &self,
        student: &dyn Adaptation,
        moment: AuditMoment,
    ) -> Result<(), TrainError> {
        for folder in student.audited(moment)? {
            write_folder(&self.folder, "", &folder)?;
        }
        Ok(())
    }

    /// Writes the micro-batches of a step. The last one has the gradient norm before clipping and the learning rate as well.
    fn write_step(&self, report: &StepReport) -> Result<(), TrainError> {
        for (micro_batch, trace) in report.traces.iter().enumerate() {
            let tensors = trace.to_cpu()?;
            let mut tensors: Tensors = tensors
                .into_iter()
                .map(|(name, tensor)| (name.to_owned(), tensor))
                .collect();
            if micro_batch + 1 == report.traces.len() {
                let number = |x: f64| Tensor::new(x as f32, &Device::Cpu);
                tensors.insert("grad_norm".to_owned(), number(report.record.grad_norm)?);
                tensors.insert("lr".to_owned(), number(report.record.lr)?);
            }
            let name = format!(
                "step-{:06}.{micro_batch:02}.safetensors",
                report.record.step
            );
            let mut writer = self.folder.create(&name)?;
            let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
            write_safetensors(&mut writer, named, None)
                .map_err(|error| self.folder.failed(&name, error))?;
            writer.finish()?;
        }
        Ok(())
    }
}

impl Observer for AuditWriter {
    fn wants_traces(&self, step: u64) -> bool {
        step <= self.steps
    }

    fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if !self.wants_traces(report.record.step) {
            return Ok(());
        }
        self.write_step(report)?;
        if report.record.step == self.steps {
            self.write_student(&*run.state.student, AuditMoment::Final)?;
        }
        Ok(())
    }
}

/// Every hyper-parameter that a replay needs.
fn meta(config: &Config, steps: u64, objective: &dyn Objective, student: &dyn Adaptation) -> Value {
    let Config {
        distill,
        optimizer,
        train,
        ..
    } = config;
    let mut meta = json!({
        "teacher": config.model.teacher,
        "steps": steps,
        "loss": distill.loss,
        "huber_c": distill.huber_c,
        "ema_decay": distill.ema_decay,
        "time_cond_proj_dim": student.student().guidance_width(),
        "lora": config.lora,
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
    if let Some(meta) = meta.as_object_mut() {
        meta.extend(objective.describe());
    }
    meta
}
