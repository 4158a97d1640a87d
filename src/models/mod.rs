//! The networks of a Stable Diffusion pipeline, built from a folder in diffusers layout and written back to one.
//!
//! Each model is a struct of layers with `new(vb, config)` and `forward`; layers and parameters are named as in the
//! checkpoints. A network is built over any set of named tensors, frozen or variable. This module never trains one.

mod activation;
mod adapter;
mod blocks;
mod builder;
pub mod clip;
mod config;
mod denoiser;
mod fingerprint;
#[cfg(test)]
mod golden;
mod layers;
mod mapped;
mod not_finite;
mod pipeline;
#[cfg(test)]
mod tests;
pub mod tokenizer;
mod transformer;
pub mod unet;
pub mod vae;
mod weight_files;
mod weight_names;
mod weights;

pub use adapter::{Adapter, Dropout};
pub use clip::{ClipTextModel, PenultimateStates};
pub(crate) use config::{nearest_key, numbers, warn_once};
pub use denoiser::{Conditioning, Denoiser};
pub(crate) use fingerprint::text as fingerprint_text;
pub use fingerprint::{fingerprint, fingerprint_in_one, settings};
pub use not_finite::{NotFiniteTensor, first_not_finite};
pub use pipeline::{
    PipelineMismatch, PipelineParts, TEXT_ENCODER_2, TextPart, TextParts, check_fit, forces_zeros,
    further_inputs,
};
pub use tokenizer::{CaptionIds, ClipTokenizer};
pub use unet::{UNet, UNetConfig, casts_parameter};
pub use vae::{AutoencoderKl, VaeConfig};
pub use weight_files::{TEXT_ENCODER_STEM, WeightsFile, choose_weights, file_names, index_shards};
pub use weights::{
    FileContents, Weights, config_text, count_parameters, model_metadata, read_tensors, save_model,
    tensor_names, tensor_shapes, weights_file, write_safetensors,
};

use std::path::PathBuf;

/// Faults of a model folder.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A folder without weights in a form that is read.
    #[error("no weights {}: {found}", path.display())]
    NoWeights {
        /// The file that is looked for first.
        path: PathBuf,
        /// What is there instead, and the remedy.
        found: String,
    },
    /// A tensor is in two shards, or in one file under two names that differ only in prefixes of PyTorch's wrappers.
    #[error("{}: has tensor \"{name}\", which {} has already; which one counts is not defined: save the model again", path.display(), first.display())]
    TensorTwice {
        /// The second file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The first file.
        first: PathBuf,
    },
    /// A weights file is damaged.
    #[error("{path}: not a readable safetensors file: {message}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The cause.
        message: String,
    },
    /// A `config.json` is malformed or describes no model.
    #[error("{path}: {message}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The fault and its remedy.
        message: String,
    },
    /// A tensor that the configuration needs is missing.
    #[error(
        "{origin}: tensor \"{name}\" is missing; the configuration needs it with shape {needed:?}{hint}"
    )]
    MissingTensor {
        /// The file or folder.
        origin: PathBuf,
        /// The tensor.
        name: String,
        /// The shape the configuration needs.
        needed: Vec<usize>,
        /// What the names of the other tensors tell of the file.
        hint: String,
    },
    /// A tensor has another shape than the configuration needs.
    #[error("{origin}: tensor \"{name}\" has shape {found:?}; the configuration needs {needed:?}")]
    WrongShape {
        /// The file or folder.
        origin: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape the configuration needs.
        needed: Vec<usize>,
    },
    /// Tensors that the configuration does not use.
    #[error("{origin}: tensors that the configuration has no place for: {}{hint}", names.join(", "))]
    UnexpectedTensors {
        /// The file or folder.
        origin: PathBuf,
        /// The first few of the tensors.
        names: Vec<String>,
        /// What the names of the tensors tell of the file.
        hint: String,
    },
    /// A tokenizer's files do not make a tokenizer.
    #[error("{folder}: {message}")]
    Tokenizer {
        /// The folder.
        folder: PathBuf,
        /// The cause.
        message: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(candle_core::Error),
}

/// The end of a message about an unknown key.
pub(crate) fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |key| format!("; did you mean \"{key}\"?"))
}
