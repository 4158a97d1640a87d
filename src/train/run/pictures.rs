//! The grids and curves drawn while a run goes on.

use std::path::Path;

use super::Run;
use crate::monitor::Monitor;
use crate::stop::Stop;
use crate::train::TrainError;
use crate::train::progress::Progress;
use crate::train::report::{GRIDS, grid_path, loss_curve, validation_grids};

impl Run<'_> {
    /// The grids of a checkpoint's step, if the run was ended between the two.
    pub(super) fn missing_grids(
        &mut self,
        progress: &Progress,
        stop: &Stop,
    ) -> Result<(), TrainError> {
        let there = |name| grid_path(self.output.folder(), self.step, name).is_file();
        match self.step == 0 || GRIDS.into_iter().all(there) {
            true => Ok(()),
            false => self.grids(progress, stop),
        }
    }

    /// Grids and curves, if they are due.
    pub(super) fn grids(&mut self, progress: &Progress, stop: &Stop) -> Result<(), TrainError> {
        match self.draw_grids(progress, stop) {
            // The loop sees the stop and saves.
            Err(TrainError::Stopped) => Ok(()),
            Err(error @ TrainError::Io { .. }) => {
                progress.say(format!("warning: {error}; this picture is left out"));
                Ok(())
            }
            drawn => drawn,
        }
    }

    fn draw_grids(&mut self, progress: &Progress, stop: &Stop) -> Result<(), TrainError> {
        if let Some((prompts, validation)) = &self.validation
            && self.step.is_multiple_of(validation.every)
        {
            let folder = self.output.folder();
            validation_grids(
                folder,
                self.step,
                (prompts, validation),
                &self.encoders,
                &self.student,
                &self.distillation,
                stop,
            )?;
            self.tracker.grids(self.step, progress);
            show_grid(&self.monitor, folder, self.step);
            loss_curve(folder, self.log.records(), self.endpoint.as_ref())?;
        }
        Ok(())
    }
}

/// Shows the grid of this step to those who look on, if it was drawn.
pub(super) fn show_grid(monitor: &Monitor, folder: &Path, step: u64) {
    let path = grid_path(folder, step, "target");
    if path.is_file() {
        monitor.grid(step, path);
    }
}
