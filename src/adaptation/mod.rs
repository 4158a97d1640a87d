//! Adaptations: the trained part of a network, the student built over it, and the files that hold it.

mod dropout;
mod full;
mod lora;
mod saved;

use std::fmt;

use candle_core::{DType, Result};

pub use full::Full;
pub use lora::{Lora, LoraOptions};
pub use saved::{ModelFolder, SAVED_FOLDERS, SavedFolder, TensorFile, saved_folders};

use crate::models::Denoiser;
use crate::ops::{Activations, Attention};
use crate::params::ParamSet;

/// A student with its trained variables.
pub trait Adaptation: fmt::Debug {
    /// The trained part of the network, for people: `the whole UNet`.
    fn describe(&self) -> String;

    /// The trained variables.
    fn params(&self) -> &ParamSet;

    /// The moving average of the trained variables, with the same names; `None` for a student without one.
    fn target_params(&self) -> Option<&ParamSet>;

    /// The student for training: its forward pass records a graph.
    fn student(&self) -> &dyn Denoiser;

    /// The student for sampling: the same weights, no graph.
    fn frozen_student(&self) -> &dyn Denoiser;

    /// The network whose prediction the student learns, without a graph: that of the moving average, without one the student's
    /// own.
    fn target(&self) -> &dyn Denoiser;

    /// The network that the run leaves, for sampling: that of the moving average, without one the frozen student.
    fn result(&self) -> &dyn Denoiser {
        match self.target_params() {
            Some(_) => self.target(),
            None => self.frozen_student(),
        }
    }

    /// Names the random numbers of the forward passes that follow, where a pass has some: step and micro-batch.
    fn begin(&self, _step: u64, _micro_batch: u64) {}

    /// The folders that hold the student in a checkpoint. Their tensors share the variables' storage.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn checkpoint(&self) -> Result<Vec<ModelFolder>>;

    /// The folders of the finished run.
    ///
    /// # Errors
    /// When a tensor operation fails, or a number does not fit the type of a file.
    fn finished(&self) -> Result<Vec<ModelFolder>> {
        self.checkpoint()
    }

    /// The folders of an audit that hold the student at a moment.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn audited(&self, moment: AuditMoment) -> Result<Vec<ModelFolder>> {
        let renamed = |folder: ModelFolder| ModelFolder {
            name: format!("{}_{}", folder.name, moment.suffix()),
            ..folder
        };
        Ok(self.checkpoint()?.into_iter().map(renamed).collect())
    }
}

/// A moment at which an audit keeps the student.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditMoment {
    /// Before the first step.
    Init,
    /// After the last audited step.
    Final,
}

impl AuditMoment {
    /// The end of the names of its files and folders.
    #[must_use]
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Final => "final",
        }
    }
}

/// How a student's forward passes are computed.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOptions {
    /// Implementation of attention.
    pub attention: Attention,
    /// Activations that the blocks of the trained network keep for the backward pass.
    pub activations: Activations,
    /// Type to compute in; `None`: f32. The trained variables are then kept in this type besides f32.
    pub compute: Option<DType>,
}
