//! `loss.png`: the loss of every step and, where it was measured, the endpoint error beside the teacher's.

use std::path::PathBuf;
use std::rc::Rc;

use super::grids::warn_of_missing_picture;
use super::{Earlier, Ending, EndpointError, Observer, RunView, StepReport};
use crate::draw::{Curve, curves, save_png};
use crate::progress::Progress;
use crate::train::TrainError;
use crate::train::record::StepRecord;

/// Draws the curve with each grid and at the end of a run.
#[derive(Debug)]
pub(in crate::train) struct LossCurve {
    /// Folder of the run.
    pub(in crate::train) folder: PathBuf,
    /// The records of all steps so far.
    pub(in crate::train) records: Vec<StepRecord>,
    pub(in crate::train) endpoint: Option<Rc<EndpointError>>,
    pub(in crate::train) progress: Rc<Progress>,
}

impl LossCurve {
    fn draw(&self) -> Result<(), TrainError> {
        let mut panels = vec![Curve {
            title: "loss".to_owned(),
            points: self.records.iter().map(|r| (r.step, r.loss)).collect(),
            smoothed: true,
            references: Vec::new(),
        }];
        if let Some(endpoint) = &self.endpoint {
            panels.push(Curve {
                title: "endpoint error of the student in 1 step".to_owned(),
                points: self
                    .records
                    .iter()
                    .filter_map(|r| Some((r.step, r.endpoint_error?)))
                    .collect(),
                smoothed: false,
                references: vec![
                    ("teacher, 1 step".to_owned(), endpoint.teacher_1_step),
                    ("teacher, 4 steps".to_owned(), endpoint.teacher_4_steps),
                ],
            });
        }
        Ok(save_png(&curves(&panels), &self.folder.join("loss.png"))?)
    }
}

impl Observer for LossCurve {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.records.push(report.record.clone());
        Ok(())
    }

    fn on_grids(&mut self, _step: u64) {
        if let Err(error) = self.draw() {
            warn_of_missing_picture(&self.progress, &error);
        }
    }

    fn on_end(
        &mut self,
        ending: Ending,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        match ending {
            Ending::Done => self.draw(),
            Ending::Stopped => Ok(()),
        }
    }
}
