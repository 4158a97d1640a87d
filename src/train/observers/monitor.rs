//! The monitor: the page of a run, Prometheus and `/healthz`.

use std::path::PathBuf;

use super::grids::{GRIDS, grid_path};
use super::{Earlier, Ending, Observer, RunView, StepReport};
use crate::monitor::Monitor;
use crate::train::TrainError;

/// Tells the monitor of steps and grids.
#[derive(Debug)]
pub(in crate::train) struct MonitorReporter {
    pub(in crate::train) monitor: Monitor,
    /// Folder of the run.
    pub(in crate::train) folder: PathBuf,
    pub(in crate::train) max_steps: u64,
}

impl MonitorReporter {
    /// Shows the grid of `step`, if it is there.
    pub(in crate::train) fn show_grid(&self, step: u64) {
        let paths = GRIDS.map(|name| grid_path(&self.folder, step, name));
        if let Some(path) = paths.into_iter().find(|path| path.is_file()) {
            self.monitor.grid(step, path);
        }
    }
}

impl Observer for MonitorReporter {
    fn on_start(
        &mut self,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.monitor.expect("steps", run.state.step, self.max_steps);
        self.monitor.heartbeat();
        Ok(())
    }

    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.monitor.step((&report.record).into());
        if let Some(ranks) = report.ranks {
            self.monitor.ranks(ranks);
        }
        Ok(())
    }

    fn on_grids(&mut self, step: u64) {
        self.show_grid(step);
    }

    fn on_end(
        &mut self,
        _ending: Ending,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.monitor.stop_waiting();
        Ok(())
    }
}
