//! `metrics.jsonl`: one line a step, never one twice.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use coffey_pipeline::stages::Stage;
use serde::{Deserialize, Deserializer, Serialize};

use super::lines::Lines;
use super::{TrainError, io};
use crate::monitor::StepFigures;

/// What is recorded of a step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StepRecord {
    /// The step, from 1.
    pub(super) step: u64,
    /// Mean loss over the step's micro-batches; not a number, and `null` in the file, where it overflowed.
    #[serde(deserialize_with = "or_nan")]
    pub(super) loss: f64,
    /// Learning rate the step was made with.
    pub(super) lr: f64,
    /// Global gradient norm before clipping; not a number, and `null` in the file, where a gradient overflowed: then the step
    /// changed nothing but the loss scale.
    #[serde(deserialize_with = "or_nan")]
    pub(super) grad_norm: f64,
    /// What the loss was multiplied by, with `fp16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) loss_scale: Option<f64>,
    /// Samples trained on so far.
    pub(super) samples: u64,
    /// Epoch of the step's last sample.
    pub(super) epoch: u64,
    /// Mean squared distance of the target's one-step samples from the teacher's 50-step samples, at the steps where it is
    /// measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) endpoint_error: Option<f64>,
    /// Samples a second, of this step alone.
    pub(super) samples_per_second: f64,
    /// Seconds since the process began to train.
    pub(super) seconds: f64,
    /// The stage that holds the rest back.
    #[serde(skip_deserializing)]
    pub(super) limiting_stage: Option<Stage>,
}

/// JSON has no number for what is not finite.
fn or_nan<'de, D: Deserializer<'de>>(number: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(number)?.unwrap_or(f64::NAN))
}

impl From<&StepRecord> for StepFigures {
    fn from(record: &StepRecord) -> Self {
        Self {
            step: record.step,
            loss: record.loss,
            lr: record.lr,
            grad_norm: record.grad_norm,
            endpoint_error: record.endpoint_error,
            samples: record.samples,
        }
    }
}

/// The open log of a run.
#[derive(Debug)]
pub(super) struct MetricsLog {
    lines: Lines,
    records: Vec<StepRecord>,
}

impl MetricsLog {
    /// Opens the log of a run that goes on after step `done`: later lines, of steps that will be made again, are dropped.
    pub(super) fn open(folder: &Path, done: u64) -> Result<Self, TrainError> {
        let path = folder.join("metrics.jsonl");
        let mut records = Vec::new();
        let mut kept = String::new();
        let text = match fs::read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.map_err(io(&path))?,
        };
        for line in String::from_utf8_lossy(&text).lines() {
            // A line cut off by a crash does not parse, and belongs to a step that is made again.
            if let Ok(record) = serde_json::from_str::<StepRecord>(line)
                && record.step <= done
            {
                records.push(record);
                kept.push_str(line);
                kept.push('\n');
            }
        }
        let aside = folder.join(".metrics.jsonl.tmp");
        fs::write(&aside, kept).map_err(io(&aside))?;
        File::open(&aside)
            .and_then(|f| f.sync_all())
            .map_err(io(&aside))?;
        fs::rename(&aside, &path).map_err(io(&path))?;
        Ok(Self {
            lines: Lines::open(&path)?,
            records,
        })
    }

    /// Appends a step; see [`Lines::append`].
    pub(super) fn write(&mut self, record: StepRecord) {
        // Finite numbers and names alone: it can be put into JSON.
        if let Ok(mut line) = serde_json::to_string(&record) {
            line.push('\n');
            self.lines.append(line.as_bytes());
        }
        self.records.push(record);
    }

    /// Why lines can't be written; see [`Lines::trouble`].
    pub(super) fn trouble(&mut self) -> Option<TrainError> {
        self.lines.trouble()
    }

    /// Waits until every line is on the disk.
    pub(super) fn sync(&mut self) -> Result<(), TrainError> {
        self.lines.sync()
    }

    /// Every step so far.
    pub(super) fn records(&self) -> &[StepRecord] {
        &self.records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 0.5,
            lr: 1e-4,
            grad_norm: 1.0,
            loss_scale: None,
            samples: 4 * step,
            epoch: 0,
            endpoint_error: None,
            samples_per_second: 2.0,
            seconds: 1.0,
            limiting_stage: Some(Stage::Train),
        }
    }

    #[test]
    fn going_on_drops_later_and_broken_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        for step in 1..=5 {
            log.write(record(step));
        }
        let path = folder.path().join("metrics.jsonl");
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 10]).unwrap();
        let mut log = MetricsLog::open(folder.path(), 3).unwrap();
        log.write(record(4));
        let steps: Vec<u64> = fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<StepRecord>(line).unwrap().step)
            .collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(log.records().len(), 4);
        // A run from the start has an empty log.
        assert!(
            MetricsLog::open(folder.path(), 0)
                .unwrap()
                .records()
                .is_empty()
        );
    }
}
