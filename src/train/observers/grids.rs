//! Validation grids: the same prompts, drawn by the student and by its moving average every few steps.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::{Earlier, Observer, RunView, StepReport};
use crate::adaptation::Adaptation;
use crate::config::Validation;
use crate::draw::{grid, save_png};
use crate::encode::Encoders;
use crate::models::Denoiser;
use crate::progress::Progress;
use crate::sample::{Guidance, Prompts, decode_images};
use crate::train::TrainError;

/// Names of a step's grids: the moving average, if the student has one, and the student itself.
pub(super) const GRIDS: [&str; 2] = ["target", "online"];

/// The networks that grids are drawn with, by the names of the grids.
fn networks(student: &dyn Adaptation) -> Vec<(&'static str, &dyn Denoiser)> {
    let [target, online] = GRIDS;
    let averaged = student.target_params().map(|_| (target, student.target()));
    let online = (online, student.frozen_student());
    averaged.into_iter().chain([online]).collect()
}

/// The file of a step's grid in the run's folder.
pub(super) fn grid_path(folder: &Path, step: u64, name: &str) -> PathBuf {
    folder.join(format!("samples/step-{step}-{name}.png"))
}

/// Warns that a picture could not be written: the run goes on without it.
pub(super) fn warn_of_missing_picture(progress: &Progress, error: &TrainError) {
    progress.say(format!("warning: {error}; this picture is left out"));
}

/// Draws `samples/step-N-target.png`, if the student has a moving average, and `samples/step-N-online.png`: one row a prompt, one column an image.
#[derive(Debug)]
pub(in crate::train) struct Grids {
    /// Folder of the run.
    pub(in crate::train) folder: PathBuf,
    pub(in crate::train) validation: Validation,
    pub(in crate::train) prompts: Prompts,
    pub(in crate::train) encoders: Arc<Encoders>,
    pub(in crate::train) progress: Rc<Progress>,
}

impl Grids {
    /// Draws the grids of `step` if they are due.
    fn draw_if_due(
        &self,
        step: u64,
        run: &RunView<'_>,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if !step.is_multiple_of(self.validation.every) {
            return Ok(());
        }
        match self.draw(step, run) {
            Ok(()) => earlier.on_grids(step),
            // The loop sees the stop and saves.
            Err(TrainError::Stopped) => {}
            Err(error @ (TrainError::Io { .. } | TrainError::NotDrawn(_))) => {
                warn_of_missing_picture(&self.progress, &error);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn draw(&self, step: u64, run: &RunView<'_>) -> Result<(), TrainError> {
        let guidance = Guidance::AsNetworkTakes(self.validation.guidance);
        let sampler = run.objective.sampler(self.validation.steps);
        for (name, network) in networks(&*run.state.student) {
            let on_progress = |drawn| {
                let message = format!("drawing the grid {name} of step {step}: {drawn}");
                self.progress.between(&message);
            };
            let latents =
                self.prompts
                    .sample(network, guidance, &*sampler, run.cancel, &on_progress)?;
            let images = decode_images(&self.encoders, &latents, &on_progress)?;
            let rows: Vec<_> = images
                .chunks(self.validation.images_per_prompt)
                .map(<[_]>::to_vec)
                .collect();
            let picture = grid(&rows, &self.validation.prompts, &[]);
            save_png(&picture, &grid_path(&self.folder, step, name))?;
        }
        Ok(())
    }
}

impl Observer for Grids {
    /// Draws the grids of a checkpoint's step if the run was ended between checkpoint and grids.
    fn on_start(&mut self, run: &RunView<'_>, earlier: &mut Earlier<'_>) -> Result<(), TrainError> {
        let step = run.state.step;
        let there = |(name, _)| grid_path(&self.folder, step, name).is_file();
        if step == 0 || networks(&*run.state.student).into_iter().all(there) {
            return Ok(());
        }
        self.draw_if_due(step, run, earlier)
    }

    fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.draw_if_due(report.record.step, run, earlier)
    }
}
