//! The figures of one step, as `metrics.jsonl` holds them.

use coffey_pipeline::stages::Stage;
use serde::{Deserialize, Deserializer, Serialize};

use crate::monitor::StepFigures;

/// Figures of a step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss over the step's micro-batches; NaN, and `null` in the file, where it overflowed.
    #[serde(deserialize_with = "or_nan")]
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping; NaN, and `null` in the file, where a gradient overflowed: such a step changes the
    /// loss scale alone.
    #[serde(deserialize_with = "or_nan")]
    pub grad_norm: f64,
    /// Factor of the loss, with `fp16`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Samples trained on so far.
    pub samples: u64,
    /// Epoch of the step's last sample.
    pub epoch: u64,
    /// Mean squared distance of the target's one-step samples from the teacher's 50-step samples, at the steps where it is
    /// measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_error: Option<f64>,
    /// Samples a second, of this step alone.
    pub samples_per_second: f64,
    /// Seconds since the process began to train.
    pub seconds: f64,
    /// The stage that limits the run.
    #[serde(skip_deserializing)]
    pub limiting_stage: Option<Stage>,
}

/// Reads `null`, which stands for a number that is not finite.
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

/// Records for tests.
#[cfg(test)]
pub(super) mod fixture {
    use super::StepRecord;

    /// A plausible record of `step`.
    pub(in crate::train) fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 0.5,
            lr: 1e-4,
            grad_norm: 1.0,
            loss_scale: None,
            samples: 4 * step,
            epoch: 0,
            endpoint_error: step.is_multiple_of(2).then_some(0.25),
            samples_per_second: 2.0,
            seconds: 1.0,
            limiting_stage: None,
        }
    }
}
