//! Why a run ends before its last step.

use std::path::{Path, PathBuf};

use coffey_pipeline::stages::Stage;

use crate::diffusion::ScheduleError;
use crate::draw::SaveError;
use crate::encode::EncodeError;
use crate::lora::LoraError;
use crate::models::{ModelError, PipelineMismatch};
use crate::ranks::{ExchangeError, LanesError, RanksError};
use crate::sample::SampleError;

/// Why a run ended before its last step.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A model could not be loaded, run or saved.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A LoRA could not be made, read or written.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// The teacher's noise schedule could not be read.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The ranks of the job can't work together.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// The ranks of the job can't share the run's lanes.
    #[error(transparent)]
    Lanes(#[from] LanesError),
    /// The models do not belong together, or the configuration does not fit them.
    #[error("{0}")]
    Mismatch(String),
    /// The data or its encoding failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A tensor operation failed.
    #[error("step {step}: {source}")]
    Step {
        /// The step.
        step: u64,
        /// The cause.
        source: candle_core::Error,
    },
    /// A tensor operation outside a step failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The loss or the gradient is not finite.
    #[error("step {step}: {what} is not finite{advice}")]
    NotFinite {
        /// The step.
        step: u64,
        /// The loss or the gradient.
        what: String,
        /// Name of the first tensor in the step's trace that is not finite; `None` if all are.
        origin: Option<&'static str>,
        /// What would help, and the checkpoint to go on from; the trainer knows neither and leaves it empty.
        advice: String,
    },
    /// Trained variables have no gradient: candle drops some without an error.
    #[error("no gradient reaches {names}: a fault in coffey's operations")]
    NoGradient {
        /// The variables.
        names: String,
    },
    /// The data ended, which a training stream never does.
    #[error("the stream of batches ended at step {step}")]
    StreamEnded {
        /// The step that waited for a batch.
        step: u64,
    },
    /// No batch for too long.
    #[error("no step for {seconds} s (train.stall_timeout): the {stage} stage hangs")]
    Stalled {
        /// Length of the wait.
        seconds: u64,
        /// The stage that hangs.
        stage: Stage,
    },
    /// A file of the run could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A source or destination outside this machine failed.
    #[error(transparent)]
    Source(#[from] coffey_pipeline::SourceError),
    /// The results of a run that ends could not be saved.
    #[error("{what} could not be saved: {cause}; {rest}")]
    NotSaved {
        /// The item that was to be saved.
        what: String,
        /// Why.
        cause: Box<TrainError>,
        /// The newest checkpoint, and the remedy.
        rest: String,
    },
    /// A picture could not be drawn.
    #[error("{0}")]
    NotDrawn(String),
    /// A stop was asked for.
    #[error("stopped")]
    Stopped,
    /// A checkpoint of another version: not damaged, so it must not be skipped.
    #[error(
        "{path}: written by another version of coffey, in format {found}, and this one reads format {reads}: go on with that version, \
         or begin anew with another train.output or checkpoint.resume = \"never\""
    )]
    CheckpointFormat {
        /// The checkpoint.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The format that is read.
        reads: u32,
    },
    /// A checkpoint can't be used.
    #[error("{path}: {message}")]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The fault and the remedy.
        message: String,
    },
}

impl TrainError {
    /// An error that says which checkpoint, `newest`, there is instead of what could not be saved.
    pub(super) fn not_saved(what: String, cause: Self, newest: Option<u64>) -> Self {
        let rest = match newest {
            Some(step) => format!(
                "the newest checkpoint is checkpoint-{step}: remove the cause, and the same command goes on from it"
            ),
            None => {
                "no checkpoint has been saved: remove the cause, and the same command begins anew"
                    .to_owned()
            }
        };
        Self::NotSaved {
            what,
            cause: Box::new(cause),
            rest,
        }
    }
}

impl From<coffey_pipeline::StreamError> for TrainError {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        Self::Encode(error.into())
    }
}

impl From<PipelineMismatch> for TrainError {
    fn from(error: PipelineMismatch) -> Self {
        Self::Mismatch(error.to_string())
    }
}

impl From<SampleError> for TrainError {
    fn from(error: SampleError) -> Self {
        match error {
            SampleError::Encode(error) => Self::Encode(error),
            SampleError::Tensor(error) => Self::Tensor(error),
            SampleError::NotFinite(_) => Self::NotDrawn(error.to_string()),
            SampleError::Cancelled => Self::Stopped,
        }
    }
}

impl From<SaveError> for TrainError {
    fn from(error: SaveError) -> Self {
        Self::Io {
            path: error.path,
            source: error.source,
        }
    }
}

/// Adds the path to an i/o error.
pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { path, source }
}

impl From<ExchangeError> for TrainError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Ranks(error) => Self::Ranks(error),
            ExchangeError::Tensor(error) => Self::Tensor(error),
        }
    }
}
