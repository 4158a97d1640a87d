//! Adaptations: the trained part of a network, the student built over it, and the files that hold it.

mod full;

use std::fmt;

use serde_json::{Map, Value};

pub use full::{FOLDERS, ForwardOptions, Full};

use crate::models::Denoiser;
use crate::params::{ParamSet, Tensors};

/// A student with its trained variables.
pub trait Adaptation: fmt::Debug {
    /// The trained variables.
    fn params(&self) -> &ParamSet;

    /// The moving average of the trained variables, with the same names; `None` for a student without one.
    fn target_params(&self) -> Option<&ParamSet>;

    /// The student for training: its forward pass records a graph.
    fn student(&self) -> &dyn Denoiser;

    /// The student for sampling: the same weights, no graph.
    fn frozen_student(&self) -> &dyn Denoiser;

    /// The network of the moving average, without a graph; without a moving average the frozen student.
    fn target(&self) -> &dyn Denoiser;

    /// The folders that hold the student in a checkpoint and in the finished run. Their tensors share the variables' storage.
    fn folders(&self) -> Vec<ModelFolder>;
}

/// A model in diffusers layout, before it is written.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// Name of the folder, e.g. `unet`.
    pub name: &'static str,
    /// Content of its `config.json`.
    pub config: Map<String, Value>,
    /// Content of its weights file.
    pub tensors: Tensors,
}
