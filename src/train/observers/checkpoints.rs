//! Saving: every few steps while a run goes on, and its last step when it ends.

use std::path::PathBuf;
use std::rc::Rc;

use coffey_pipeline::counted;

use super::{Earlier, Ending, Observer, RunView, StepReport};
use crate::monitor::Monitor;
use crate::process::available_memory;
use crate::progress::Progress;
use crate::train::checkpoint::{RunIdentity, Saved, Saver, Snapshot};
use crate::train::{TrainError, TrainState, io};

/// Saves the checkpoints of a run and its finished student.
#[derive(Debug)]
pub(in crate::train) struct Checkpoints {
    pub(in crate::train) saver: Rc<Saver>,
    /// Steps between two checkpoints.
    pub(in crate::train) every: u64,
    /// Write from a copy in memory while training goes on.
    pub(in crate::train) background: bool,
    /// The last step, which is saved when the run ends.
    pub(in crate::train) max_steps: u64,
    /// Configuration and models of the run, kept in each checkpoint.
    pub(in crate::train) identity: RunIdentity,
    /// The run's output, for messages.
    pub(in crate::train) output: PathBuf,
    /// Step of the newest checkpoint.
    pub(in crate::train) newest: Option<u64>,
    pub(in crate::train) monitor: Monitor,
    pub(in crate::train) progress: Rc<Progress>,
}

impl Checkpoints {
    /// Saves a checkpoint that is due, in the background if that is wanted and memory suffices. A failure is reported and tried
    /// again at the next checkpoint: the run goes on.
    fn save(&mut self, state: &TrainState, earlier: &mut Earlier<'_>) -> Result<(), TrainError> {
        if let Some((step, outcome)) = self.saver.wait() {
            self.report(step, outcome);
        }
        let Some(snapshot) = self.unsaved(state)? else {
            return Ok(());
        };
        // A checkpoint is never ahead of the lines about its steps.
        if let Err(error) = earlier.sync() {
            self.report(state.step, Err(error));
            return Ok(());
        }
        let shortfall = memory_shortfall(state.checkpoint_bytes(), available_memory());
        let background = self.background && shortfall.is_none();
        if let (true, Some(shortfall)) = (self.background, shortfall) {
            self.progress
                .say(format!("saving step {}: {shortfall}", state.step));
        }
        if background {
            let begun = self.saver.begin(snapshot.copied()?);
            return begun.map_err(io(&self.output));
        }
        let outcome = self.saver.save(&snapshot);
        self.report(state.step, outcome);
        Ok(())
    }

    /// Saves the last step made, when the run ends.
    fn save_last(
        &mut self,
        state: &TrainState,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if let Some((step, outcome)) = self.saver.wait() {
            self.report(step, outcome);
        }
        let Some(snapshot) = self.unsaved(state)? else {
            return Ok(());
        };
        let saved = earlier.sync().and_then(|()| self.saver.save(&snapshot));
        match saved {
            Ok(saved) => self.report(state.step, Ok(saved)),
            Err(cause) => {
                let what = format!("the state of step {}", state.step);
                return Err(TrainError::not_saved(what, cause, self.newest));
            }
        }
        Ok(())
    }

    /// The state, unless it is saved already or no step was made yet.
    fn unsaved(&self, state: &TrainState) -> candle_core::Result<Option<Snapshot>> {
        if self.newest == Some(state.step) {
            return Ok(None);
        }
        Snapshot::of(state, &self.identity)
    }

    fn report(&mut self, step: u64, outcome: Result<Saved, TrainError>) {
        match outcome {
            Ok(saved) => {
                self.newest = Some(saved.step);
                self.monitor.checkpoint(saved.time);
                self.progress.say(format!("saved {}", saved.place));
                if let Some(error) = saved.not_pruned {
                    self.progress.say(format!(
                        "warning: checkpoints beyond checkpoint.keep are still there: {error}"
                    ));
                }
            }
            Err(error) => {
                let newest = match self.newest {
                    Some(step) => format!("the newest checkpoint is checkpoint-{step}"),
                    None => "none has been saved yet".to_owned(),
                };
                self.progress.say(format!(
                    "warning: checkpoint-{step} could not be saved: {error}; {newest}, training goes on and saves again after \
                     {} (checkpoint.every)",
                    counted(self.every, "step")
                ));
            }
        }
    }
}

impl Observer for Checkpoints {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if let Some((step, outcome)) = self.saver.poll() {
            self.report(step, outcome);
        }
        let step = report.record.step;
        if step.is_multiple_of(self.every) && step < self.max_steps {
            self.save(run.state, earlier)?;
        }
        Ok(())
    }

    fn on_end(
        &mut self,
        ending: Ending,
        run: &RunView<'_>,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.save_last(run.state, earlier)?;
        if ending == Ending::Done {
            let student = run.state.student.finished()?;
            let finished = self.saver.checkpoints().finish(&student);
            finished.map_err(|cause| {
                TrainError::not_saved("the finished student".to_owned(), cause, self.newest)
            })?;
        }
        Ok(())
    }
}

/// Why no copy is made for a save in the background: memory is too short for one. Sizes in bytes.
fn memory_shortfall(needed: u64, available: Option<u64>) -> Option<String> {
    let available = available.filter(|&available| available < needed)?;
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    Some(format!(
        "a copy takes {:.2} GB of memory and {:.2} GB are free, so training waits until it is written",
        gigabytes(needed),
        gigabytes(available)
    ))
}

#[cfg(test)]
mod tests {
    use super::memory_shortfall;

    #[test]
    fn memory_shortfall_names_both_figures() {
        assert_eq!(memory_shortfall(100, Some(100)), None);
        assert_eq!(memory_shortfall(100, None), None);
        let message = memory_shortfall(13_800_000_000, Some(9_100_000_000)).unwrap();
        assert!(
            message.contains("13.80 GB of memory and 9.10 GB are free"),
            "{message}"
        );
    }
}
