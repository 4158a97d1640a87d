//! Training: the step, the loop around it, and what a run leaves behind.
//!
//! [`Trainer`] makes steps: it knows an objective, networks, an optimiser and who agrees on a gradient, and nothing of data,
//! files or people. [`run`] is the command: it loads a run's parts, feeds the trainer from a stream, and shows each step to the
//! [observers](Observer). The reference is diffusers' `train_lcm_distill_sd_wds.py`.

mod agreement;
mod checkpoint;
mod error;
mod learning_rate;
mod lock;
mod loss_scale;
mod models_fingerprint;
mod not_finite;
mod observers;
mod optimizer;
mod parts;
mod record;
mod resume;
mod run;
mod run_dir;
mod run_observers;
mod same_run;
mod services;
mod state;
mod trainer;

pub use error::TrainError;
pub(crate) use error::io;
pub use lock::LockWait;
pub use loss_scale::LossScale;
pub use observers::{Earlier, Ending, Observer, Observers, RunView, StepReport};
pub use optimizer::{AdamW, OptimizerState};
pub(crate) use parts::{
    compute_dtype, describe_encoders, describe_training, encoder_options, lcm_schedule,
};
pub use record::StepRecord;
pub use run::{Outcome, RunOptions, run};
pub use run_dir::RunDir;
pub use services::Services;
pub use state::TrainState;
pub use trainer::{StepOptions, Trainer, TrainerOptions};
