//! The progress of a run on standard error, and its summary.

use std::rc::Rc;
use std::time::Instant;

use coffey_pipeline::flow::{FlowSnapshot, Recent};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{FlowMetrics, counted};

use super::skipped_log::SkipCounts;
use super::{Earlier, Ending, Observer, RunView, StepReport};
use crate::progress::{Progress, Waiting};
use crate::train::TrainError;

/// Shows each step, completes its record by the limiting stage, and at the end sums up the steps of this process.
#[derive(Debug)]
pub(in crate::train) struct Console {
    pub(in crate::train) progress: Rc<Progress>,
    pub(in crate::train) max_steps: u64,
    pub(in crate::train) skipped: SkipCounts,
    pub(in crate::train) metrics: FlowMetrics,
    /// The stages' recent times, from which the limiting stage is read.
    pub(in crate::train) recent: Recent,
    /// When this process began to train, and the steps made before.
    pub(in crate::train) begun: Option<(Instant, u64)>,
    /// Until the first step of this process.
    pub(in crate::train) waiting: Option<Waiting>,
}

impl Observer for Console {
    fn on_start(
        &mut self,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.begun = Some((Instant::now(), run.state.step));
        self.progress.start_at(run.state.step);
        self.progress.say("waiting for the first batch");
        let metrics = self.metrics.clone();
        self.waiting = Some(Waiting::begin(move || {
            let flow = metrics.snapshot();
            let [read, encoded] =
                [Stage::Untar, Stage::Encode].map(|stage| flow.stage(stage).items);
            let read = counted(read, "sample");
            format!("waiting for the first step · {read} read, {encoded} encoded")
        }));
        Ok(())
    }

    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.waiting = None;
        let record = &mut report.record;
        let recent = self.recent.mark(&self.metrics);
        record.limiting_stage = recent.and_then(FlowSnapshot::limiting_stage);
        let limit = record
            .limiting_stage
            .map(|stage| format!(" · limit: {stage}"))
            .unwrap_or_default();
        let message = format!(
            "loss {:.4} · grad {:.3} · {:.1} samples/s{limit}",
            record.loss, record.grad_norm, record.samples_per_second
        );
        self.progress.update(record.step, &message, || {
            format!("step {}/{} · {message}", record.step, self.max_steps)
        });
        Ok(())
    }

    fn on_end(
        &mut self,
        _ending: Ending,
        run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        let Some((begun, first)) = self.begun else {
            return Ok(());
        };
        let seconds = begun.elapsed().as_secs_f64();
        let overall = self.recent.overall(&self.metrics);
        let limit = overall.and_then(|flow| flow.limiting_stage());
        let mut parts = vec![format!(
            "{} in {seconds:.1} s",
            counted(run.state.step - first, "step")
        )];
        parts.extend(limit.map(|stage| format!("limit: {stage}")));
        let counts = self.skipped.borrow();
        let counts: Vec<String> = counts
            .iter()
            .map(|(reason, n)| format!("{reason} {n}"))
            .collect();
        if !counts.is_empty() {
            parts.push(format!("left out since step 1: {}", counts.join(", ")));
        }
        let cut = self.metrics.snapshot().truncated_captions;
        if cut > 0 {
            parts.push(format!("captions cut, with too many tokens: {cut}"));
        }
        self.progress.say(parts.join(" · "));
        Ok(())
    }
}
