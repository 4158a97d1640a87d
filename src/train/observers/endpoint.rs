//! The endpoint error: how far the student's samples are from the teacher's.

use std::rc::Rc;

use candle_core::Tensor;
use coffey_pipeline::counted;
use tokio_util::sync::CancellationToken;

use super::{Earlier, Observer, RunView, StepReport};
use crate::diffusion::{DdimSampler, NoiseSchedule};
use crate::models::Denoiser;
use crate::objective::Objective;
use crate::progress::Progress;
use crate::sample::{Drawn, Guidance, Prompts};
use crate::train::TrainError;

/// Steps of the teacher's sampler whose samples count as its endpoints.
pub(in crate::train) const ENDPOINT_STEPS: usize = 50;

/// A teacher that draws samples by DDIM over trailing timesteps, under classifier-free guidance.
#[derive(Clone, Debug)]
pub(in crate::train) struct TeacherSampler {
    pub(in crate::train) denoiser: Rc<dyn Denoiser>,
    pub(in crate::train) schedule: NoiseSchedule,
}

impl TeacherSampler {
    /// Samples in `steps` steps, scaled latents `[count, C, h, w]`.
    pub(in crate::train) fn sample(
        &self,
        prompts: &Prompts,
        steps: usize,
        scale: f64,
        cancel: &CancellationToken,
        on_pass: &dyn Fn(Drawn),
    ) -> Result<Tensor, TrainError> {
        let guidance = Guidance::ClassifierFree(scale);
        let sampler = DdimSampler::new(&self.schedule, steps);
        Ok(prompts.sample(&*self.denoiser, guidance, &sampler, cancel, on_pass)?)
    }
}

/// Mean squared distance, in scaled latents, of samples from the teacher's 50-step DDIM samples: same noise, same captions, same
/// guidance.
#[derive(Debug)]
pub(in crate::train) struct EndpointError {
    prompts: Prompts,
    guidance: f64,
    reference: Tensor,
    /// The teacher's own error in one step.
    pub(in crate::train) teacher_1_step: f64,
    /// The teacher's own error in four steps.
    pub(in crate::train) teacher_4_steps: f64,
}

impl EndpointError {
    /// Draws the teacher's samples.
    pub(in crate::train) fn new(
        prompts: Prompts,
        guidance: f64,
        teacher: &TeacherSampler,
        cancel: &CancellationToken,
        progress: &Progress,
    ) -> Result<Self, TrainError> {
        let draw = |steps| {
            let on_pass = |drawn| {
                progress.between(&format!(
                    "teacher's endpoints in {}: {drawn}",
                    counted(steps, "step")
                ));
            };
            teacher.sample(&prompts, steps, guidance, cancel, &on_pass)
        };
        let reference = draw(ENDPOINT_STEPS)?;
        let teacher_1_step = distance(&draw(1)?, &reference)?;
        let teacher_4_steps = distance(&draw(4)?, &reference)?;
        Ok(Self {
            prompts,
            guidance,
            reference,
            teacher_1_step,
            teacher_4_steps,
        })
    }

    /// The error of a student's samples in `steps` steps.
    pub(in crate::train) fn of(
        &self,
        student: &dyn Denoiser,
        steps: usize,
        objective: &dyn Objective,
        cancel: &CancellationToken,
        progress: &Progress,
    ) -> Result<f64, TrainError> {
        let guidance = Guidance::Distilled(self.guidance);
        let sampler = objective.sampler(steps);
        let on_pass = |drawn| progress.between(&format!("measuring the endpoint error: {drawn}"));
        let prompts = &self.prompts;
        let drawn = prompts.sample(student, guidance, &*sampler, cancel, &on_pass)?;
        distance(&drawn, &self.reference)
    }
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64, TrainError> {
    Ok(f64::from((a - b)?.sqr()?.mean_all()?.to_scalar::<f32>()?))
}

/// A number with three significant digits.
pub(in crate::train) fn figure(x: f64) -> String {
    let digits = (2 - x.abs().max(1e-12).log10().floor() as i32).clamp(0, 6) as usize;
    format!("{x:.digits$}")
}

/// Measures the endpoint error of the network that the run leaves every few steps.
#[derive(Debug)]
pub(in crate::train) struct Endpoint {
    pub(in crate::train) error: Rc<EndpointError>,
    /// Steps between two measurements.
    pub(in crate::train) every: u64,
    /// The last step, which is always measured.
    pub(in crate::train) max_steps: u64,
    pub(in crate::train) progress: Rc<Progress>,
}

impl Observer for Endpoint {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        let step = report.record.step;
        if step.is_multiple_of(self.every) || step == self.max_steps {
            // Never cut short: the record of a step does not depend on when a stop is asked for.
            let never = CancellationToken::new();
            let drawn = run.state.student.result();
            let error = (self.error).of(drawn, 1, run.objective, &never, &self.progress)?;
            report.record.endpoint_error = Some(error);
        }
        Ok(())
    }
}
