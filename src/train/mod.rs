//! Distillation: the step, the loop around it, and what a run leaves behind.
//!
//! The step is written over named pieces (teacher estimate, solver, boundary, loss) in `step`; what is trained is a set of
//! named variables (`student`). [`run`] is the loop. The reference is diffusers' `train_lcm_distill_sd_wds.py`.

mod audit;
mod checkpoint;
mod data;
mod learning_rate;
mod lines;
mod log;
mod loss_scale;
mod optimizer;
mod output;
mod progress;
mod report;
mod run;
mod setup;
mod skipped;
mod step;
mod student;
mod tracking;
mod validation;
mod watchdog;

pub use data::Data;
pub use run::{Outcome, run};
pub(crate) use setup::{check_fit, distillation};
pub use step::{Distillation, Loss, StepInputs, StepOutputs};
pub use student::{Passes, Student};

use std::path::{Path, PathBuf};

use coffey_pipeline::stages::Stage;

use crate::diffusion::ScheduleError;
use crate::encode::EncodeError;
use crate::models::ModelError;

/// Why a run ended before its last step.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A model could not be loaded, run or saved.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The teacher's noise schedule could not be read.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
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
    /// The loss or a gradient is not a number.
    #[error(
        "step {step}: {what} is not finite; nothing was saved after it. A lower optimizer.learning_rate or \
         optimizer.max_grad_norm may help; the last checkpoint is whole"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// The loss or a variable.
        what: String,
    },
    /// A variable that should be trained gets no gradient.
    #[error("no gradient reaches {names}: a fault in coffey's operations")]
    NoGradient {
        /// The variables.
        names: String,
    },
    /// The data ended although it should not.
    #[error("the stream of batches ended at step {step}")]
    StreamEnded {
        /// The step that waited for a batch.
        step: u64,
    },
    /// No step for too long.
    #[error("no step for {seconds} s (train.stall_timeout): the {stage} stage hangs")]
    Stalled {
        /// How long.
        seconds: u64,
        /// The stage that neither works nor waits for another.
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
    /// A place outside this machine could not be read or written.
    #[error(transparent)]
    Source(#[from] coffey_pipeline::SourceError),
    /// A run ends, and what it came to could not be kept.
    #[error("{what} could not be saved: {cause}; {rest}")]
    NotSaved {
        /// What is lost.
        what: String,
        /// Why.
        cause: Box<TrainError>,
        /// What there is instead, and what to do.
        rest: String,
    },
    /// A stop was asked for before there was anything to save.
    #[error("stopped")]
    Stopped,
    /// A checkpoint of another version, which is not damaged and must not be passed over.
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
        /// What is wrong and what to do.
        message: String,
    },
}

impl From<coffey_pipeline::StreamError> for TrainError {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        Self::Encode(error.into())
    }
}

/// Adds the path to an i/o error.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrainError {
    let path = path.to_owned();
    move |source| TrainError::Io { path, source }
}
