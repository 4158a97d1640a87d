//! The grids and curves drawn while a run goes on.

use super::Run;
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
        let there = |name| grid_path(self.output, self.step, name).is_file();
        match self.step == 0 || GRIDS.into_iter().all(there) {
            true => Ok(()),
            false => self.grids(progress, stop),
        }
    }

    /// Grids and curves, if they are due.
    pub(super) fn grids(&mut self, progress: &Progress, stop: &Stop) -> Result<(), TrainError> {
        if let Some((prompts, validation)) = &self.validation
            && self.step.is_multiple_of(validation.every)
        {
            let drawn = validation_grids(
                self.output,
                self.step,
                (prompts, validation),
                &self.encoders,
                &self.student,
                &self.distillation,
                stop,
            );
            match drawn {
                // The loop sees the stop and saves.
                Err(TrainError::Stopped) => return Ok(()),
                drawn => drawn?,
            }
            self.tracker.grids(self.step, progress);
            loss_curve(self.output, self.log.records(), self.endpoint.as_ref())?;
        }
        Ok(())
    }
}
