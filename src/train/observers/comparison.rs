//! The end of a run: teacher and student side by side, and the endpoint error of both.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use coffey_pipeline::counted;

use super::endpoint::ENDPOINT_STEPS;
use super::grids::warn_of_missing_picture;
use super::{
    Earlier, Ending, EndpointError, Observer, RunView, StepReport, TeacherSampler, figure,
};
use crate::draw::{grid, save_png};
use crate::encode::Encoders;
use crate::progress::Progress;
use crate::sample::{Guidance, Prompts, decode_images};
use crate::train::TrainError;

/// Inputs of `samples/comparison.png`.
#[derive(Debug)]
pub(in crate::train) struct ComparisonGrid {
    /// Folder of the run.
    pub(in crate::train) folder: PathBuf,
    pub(in crate::train) prompts: Prompts,
    /// The captions of the prompts.
    pub(in crate::train) labels: Vec<String>,
    pub(in crate::train) guidance: f64,
    pub(in crate::train) teacher: TeacherSampler,
    pub(in crate::train) encoders: Arc<Encoders>,
}

/// Draws the comparison and reports the endpoint error when a run is done.
#[derive(Debug)]
pub(in crate::train) struct Comparison {
    pub(in crate::train) grid: Option<ComparisonGrid>,
    pub(in crate::train) endpoint: Option<Rc<EndpointError>>,
    pub(in crate::train) progress: Rc<Progress>,
}

impl ComparisonGrid {
    /// For each prompt the teacher in 50 and 4 steps and the student (its moving average) in 4 and 1, from the same noise.
    fn draw(&self, run: &RunView<'_>, progress: &Progress) -> Result<(), TrainError> {
        let between = |part: &str, steps, drawn| {
            let steps = counted(steps, "step");
            progress.between(&format!(
                "samples/comparison.png: {part} in {steps}, {drawn}"
            ));
        };
        let teacher = |steps| {
            let on_pass = |drawn| between("teacher", steps, drawn);
            self.teacher
                .sample(&self.prompts, steps, self.guidance, run.cancel, &on_pass)
        };
        let student = |steps| {
            let sampler = run.objective.sampler(steps);
            let guidance = Guidance::Distilled(self.guidance);
            let network = run.state.student.result();
            let on_pass = |drawn| between("student", steps, drawn);
            let prompts = &self.prompts;
            let drawn = prompts.sample(network, guidance, &*sampler, run.cancel, &on_pass);
            drawn.map_err(TrainError::from)
        };
        let columns = [
            teacher(ENDPOINT_STEPS)?,
            teacher(4)?,
            student(4)?,
            student(1)?,
        ];
        let on_image = |drawn| progress.between(&format!("samples/comparison.png: {drawn}"));
        let columns = columns
            .iter()
            .map(|latents| decode_images(&self.encoders, latents, &on_image))
            .collect::<Result<Vec<_>, _>>()?;
        let rows: Vec<_> = (0..self.prompts.count())
            .map(|i| columns.iter().map(|images| images[i].clone()).collect())
            .collect();
        let titles = [
            "teacher, 50 steps",
            "teacher, 4 steps",
            "student, 4 steps",
            "student, 1 step",
        ];
        let picture = grid(&rows, &self.labels, &titles.map(str::to_owned));
        Ok(save_png(
            &picture,
            &self.folder.join("samples/comparison.png"),
        )?)
    }
}

impl Observer for Comparison {
    fn on_step(
        &mut self,
        _report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        Ok(())
    }

    fn on_end(
        &mut self,
        ending: Ending,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if ending == Ending::Stopped {
            return Ok(());
        }
        if let Some(grid) = &self.grid {
            self.progress
                .say("drawing teacher and student side by side");
            match grid.draw(run, &self.progress) {
                Ok(()) => self.progress.say("drew samples/comparison.png"),
                Err(error @ TrainError::NotDrawn(_)) => {
                    warn_of_missing_picture(&self.progress, &error);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(endpoint) = &self.endpoint {
            let network = run.state.student.result();
            let error =
                |steps| endpoint.of(network, steps, run.objective, run.cancel, &self.progress);
            let (student, student_4_steps) = (error(1)?, error(4)?);
            let (one, four) = (endpoint.teacher_1_step, endpoint.teacher_4_steps);
            self.progress.say(format!(
                "endpoint error: student in 1 step {}, in 4 steps {} · teacher in 1 step {}, in 4 steps {} (student / teacher in 1 \
                 step: {:.2})",
                figure(student),
                figure(student_4_steps),
                figure(one),
                figure(four),
                student / one
            ));
        }
        Ok(())
    }
}
