//! Observers of a run: records, pictures, figures, checkpoints.
//!
//! Observers see each step after it is made, in the order of their list, and never change what is trained. The list's order
//! matters in two places: an observer that completes a record (the endpoint error) comes before those that write it down, and
//! checkpoints come after the logs, which a checkpoint must not be ahead of.

mod append_log;
mod audit;
mod checkpoints;
mod comparison;
mod console;
mod endpoint;
mod grids;
mod log_faults;
mod loss_curve;
mod metrics_log;
mod monitor;
mod skipped_log;
mod tracker;

use std::fmt;

use coffey_pipeline::SkippedSample;
use tokio_util::sync::CancellationToken;

pub(super) use audit::AuditWriter;
pub(super) use checkpoints::Checkpoints;
pub(super) use comparison::{Comparison, ComparisonGrid};
pub(super) use console::Console;
pub(super) use endpoint::{Endpoint, EndpointError, TeacherSampler, figure};
pub(super) use grids::Grids;
pub(super) use loss_curve::LossCurve;
pub(super) use metrics_log::MetricsLog;
pub(super) use monitor::MonitorReporter;
pub(super) use skipped_log::{SkippedLog, list_skipped};
pub(super) use tracker::TrackedRun;

use super::{StepRecord, TrainError, TrainState};
use crate::monitor::RankFigures;
use crate::objective::{Objective, Trace};

/// Figures and traces of a step that was just made.
#[derive(Debug)]
pub struct StepReport {
    /// The step's figures.
    pub record: StepRecord,
    /// Inputs and results of each micro-batch; empty unless an observer asked for them.
    pub traces: Vec<Trace>,
    /// Samples skipped since the step before, in stream order.
    pub skipped: Vec<SkippedSample>,
    /// How the ranks made the step, on rank 0 of several.
    pub ranks: Option<RankFigures>,
    /// Whether a stop was asked for: this step is the last.
    pub stop: bool,
}

/// A run between two steps.
#[derive(Clone, Copy, Debug)]
pub struct RunView<'a> {
    /// State after the step.
    pub state: &'a TrainState,
    /// Objective of the run.
    pub objective: &'a dyn Objective,
    /// Cancelled when the run is to stop: long work should end early.
    pub cancel: &'a CancellationToken,
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are made.
    Done,
    /// A stop was asked for.
    Stopped,
}

/// Watches a run. Every method but [`Observer::on_step`] does nothing unless it is written.
pub trait Observer: fmt::Debug {
    /// Whether the observer needs the traces of `step`.
    fn wants_traces(&self, _step: u64) -> bool {
        false
    }

    /// This process is about to make its first step.
    ///
    /// # Errors
    /// An error ends the run.
    fn on_start(
        &mut self,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        Ok(())
    }

    /// A step was made. `earlier` are the observers before this one in the list, which have seen the step.
    ///
    /// # Errors
    /// An error ends the run.
    fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
        earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError>;

    /// The grids of `step` are in the run's `samples/`.
    fn on_grids(&mut self, _step: u64) {}

    /// The run ends in an error at `step`. `skipped` are the samples skipped since the step before.
    ///
    /// # Errors
    /// When they can't be recorded.
    fn on_failed(&mut self, _step: u64, _skipped: &[SkippedSample]) -> Result<(), TrainError> {
        Ok(())
    }

    /// Makes everything written about the steps so far durable.
    ///
    /// # Errors
    /// When it can't be written; no checkpoint is saved then.
    fn sync(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    /// The last step of this process was made.
    ///
    /// # Errors
    /// An error ends the run with that error.
    fn on_end(
        &mut self,
        _ending: Ending,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        Ok(())
    }
}

/// The observers before one in the list.
#[derive(Debug)]
pub struct Earlier<'a>(&'a mut [Box<dyn Observer>]);

impl Earlier<'_> {
    /// Makes everything that these observers wrote durable.
    ///
    /// # Errors
    /// The first error of an observer.
    pub fn sync(&mut self) -> Result<(), TrainError> {
        self.0.iter_mut().try_for_each(|observer| observer.sync())
    }

    /// Tells these observers that the grids of `step` are in the run's `samples/`.
    pub fn on_grids(&mut self, step: u64) {
        for observer in &mut *self.0 {
            observer.on_grids(step);
        }
    }
}

/// Observers in the order in which they see a step.
#[derive(Debug, Default)]
pub struct Observers(Vec<Box<dyn Observer>>);

impl Observers {
    /// Adds an observer after those that are there.
    pub fn push(&mut self, observer: impl Observer + 'static) {
        self.0.push(Box::new(observer));
    }

    /// Whether an observer needs the traces of `step`.
    pub fn wants_traces(&self, step: u64) -> bool {
        self.0.iter().any(|observer| observer.wants_traces(step))
    }

    /// Tells every observer that this process is about to make its first step.
    ///
    /// # Errors
    /// The first error of an observer.
    pub fn on_start(&mut self, run: &RunView<'_>) -> Result<(), TrainError> {
        self.each(|observer, earlier| observer.on_start(run, earlier))
    }

    /// Shows a step to every observer.
    ///
    /// # Errors
    /// The first error of an observer.
    pub fn on_step(
        &mut self,
        report: &mut StepReport,
        run: &RunView<'_>,
    ) -> Result<(), TrainError> {
        self.each(|observer, earlier| observer.on_step(report, run, earlier))
    }

    /// Tells every observer that the run ends in an error at `step`.
    ///
    /// # Errors
    /// The first error of an observer.
    pub fn on_failed(&mut self, step: u64, skipped: &[SkippedSample]) -> Result<(), TrainError> {
        self.each(|observer, _| observer.on_failed(step, skipped))
    }

    /// Tells every observer that the last step of this process was made.
    ///
    /// # Errors
    /// The first error of an observer.
    pub fn on_end(&mut self, ending: Ending, run: &RunView<'_>) -> Result<(), TrainError> {
        self.each(|observer, earlier| observer.on_end(ending, run, earlier))
    }

    fn each(
        &mut self,
        mut tell: impl FnMut(&mut dyn Observer, &mut Earlier<'_>) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        for index in 0..self.0.len() {
            let (earlier, rest) = self.0.split_at_mut(index);
            tell(rest[0].as_mut(), &mut Earlier(earlier))?;
        }
        Ok(())
    }
}
