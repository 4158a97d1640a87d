//! Saving: what is due while the run goes on, and what must be kept when it ends.

use candle_core::Device;

use super::Run;
use crate::process::available_memory;
use crate::train::TrainError;
use crate::train::checkpoint::{Found, OPTIMIZER, Saved, Snapshot, State};
use crate::train::optimizer::AdamW;
use crate::train::progress::Progress;

impl Run<'_> {
    /// Saves the checkpoint that is due, in the background if that is wanted and there is memory for it. What can't be saved is
    /// said, and tried again when the next one is due: the run goes on.
    pub(super) fn save(&mut self, progress: &Progress) -> Result<(), TrainError> {
        if let Some((step, outcome)) = self.saver.wait() {
            self.saved_or_not(progress, step, outcome);
        }
        // Before the first step there is nothing to save.
        if self.saved == Some(self.step) || self.cursor.is_none() {
            return Ok(());
        }
        // The lines of a checkpoint's steps are never lost with it there.
        if let Err(error) = self.sync_lines() {
            self.saved_or_not(progress, self.step, Err(error));
            return Ok(());
        }
        self.tracker.sync(progress);
        let needed = Snapshot::bytes(&self.student, &self.optimizer);
        let short = no_room(needed, available_memory());
        let background = self.config.checkpoint.background && short.is_none();
        if let (true, Some(short)) = (self.config.checkpoint.background, short) {
            progress.say(format!("saving step {}: {short}", self.step));
        }
        let Some(snapshot) = self.snapshot(background)? else {
            return Ok(());
        };
        if background {
            let begun = self.saver.begin(snapshot);
            return begun.map_err(crate::train::io(self.output.place()));
        }
        let outcome = self.saver.save(&snapshot);
        self.saved_or_not(progress, self.step, outcome);
        self.monitor.beat();
        Ok(())
    }

    /// Saves the last step made, when the run ends.
    pub(super) fn save_at_the_end(&mut self, progress: &Progress) -> Result<(), TrainError> {
        if let Some((step, outcome)) = self.saver.wait() {
            self.saved_or_not(progress, step, outcome);
        }
        if self.saved == Some(self.step) {
            return Ok(());
        }
        let Some(snapshot) = self.snapshot(false)? else {
            return Ok(());
        };
        self.tracker.sync(progress);
        let saved = self.sync_lines().and_then(|()| self.saver.save(&snapshot));
        match saved {
            Ok(saved) => self.saved_or_not(progress, self.step, Ok(saved)),
            Err(cause) => {
                let what = format!("the state of step {}", self.step);
                return Err(self.not_saved(what, cause));
            }
        }
        Ok(())
    }

    /// Takes note of a save in the background that is over.
    pub(super) fn saves_that_are_over(&mut self, progress: &Progress) {
        if let Some((step, outcome)) = self.saver.over() {
            self.saved_or_not(progress, step, outcome);
        }
    }

    /// An error that says what there is instead of what could not be saved.
    pub(super) fn not_saved(&self, what: String, cause: TrainError) -> TrainError {
        let rest = match self.saved {
            Some(step) => format!(
                "checkpoint-{step} stands: when that is mended, the same command goes on from it"
            ),
            None => {
                "no checkpoint stands: when that is mended, the same command begins anew".to_owned()
            }
        };
        TrainError::NotSaved {
            what,
            cause: Box::new(cause),
            rest,
        }
    }

    /// The run as it is now; `None` before its first step.
    pub(super) fn snapshot(&self, copied: bool) -> Result<Option<Snapshot>, TrainError> {
        let Some(cursor) = self.cursor.clone() else {
            return Ok(None);
        };
        let state = State::new(
            (self.step, self.samples),
            self.optimizer.numbers(),
            cursor,
            self.configuration.clone(),
        );
        let snapshot = Snapshot::take(&self.student, &self.optimizer, state, copied)?;
        Ok(Some(snapshot))
    }

    fn sync_lines(&mut self) -> Result<(), TrainError> {
        self.log.sync()?;
        self.skipped.sync()
    }

    fn saved_or_not(&mut self, progress: &Progress, step: u64, outcome: Result<Saved, TrainError>) {
        match outcome {
            Ok(saved) => {
                self.saved = Some(saved.step);
                self.monitor.checkpoint(saved.time);
                progress.say(format!("saved {}", saved.place));
                if let Some(error) = saved.older {
                    progress.say(format!(
                        "warning: checkpoints beyond checkpoint.keep are still there: {error}"
                    ));
                }
            }
            Err(error) => {
                let stands = match self.saved {
                    Some(step) => format!("checkpoint-{step} stands"),
                    None => "none stands yet".to_owned(),
                };
                progress.say(format!(
                    "warning: checkpoint-{step} could not be saved: {error}; {stands}, training goes on and saves again after \
                     {} steps (checkpoint.every)",
                    self.config.checkpoint.every
                ));
            }
        }
    }
}

/// Why there is no copy to save from in the background, if memory is too short for one.
fn no_room(needed: u64, available: Option<u64>) -> Option<String> {
    let available = available.filter(|&available| available < needed)?;
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    Some(format!(
        "a copy takes {:.2} GB of memory and {:.2} GB are free, so training waits until it is written",
        gigabytes(needed),
        gigabytes(available)
    ))
}

/// Takes up the optimiser's state from a checkpoint.
pub(super) fn restore_optimizer(
    found: &Found,
    optimizer: &mut AdamW,
    device: &Device,
) -> Result<(), TrainError> {
    let path = found.folder.join(OPTIMIZER);
    let tensors = candle_core::safetensors::load(path, device)?;
    match optimizer.restore(&tensors, found.state.optimizer)? {
        None => Ok(()),
        Some(wrong) => Err(TrainError::Checkpoint {
            path: found.place.clone().into(),
            message: format!("{OPTIMIZER}: {wrong}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::no_room;

    #[test]
    fn a_copy_that_does_not_fit_is_not_made_and_both_figures_are_said() {
        assert_eq!(no_room(100, Some(100)), None);
        assert_eq!(no_room(100, None), None);
        let said = no_room(13_800_000_000, Some(9_100_000_000)).unwrap();
        assert!(
            said.contains("13.80 GB of memory and 9.10 GB are free"),
            "{said}"
        );
    }
}
