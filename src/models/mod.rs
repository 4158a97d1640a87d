//! The networks of a Stable Diffusion pipeline, built from a folder in diffusers layout and written back to one.
//!
//! Each model is a struct of layers with `new(vb, config)` and `forward`; layers and parameters are named as in the
//! checkpoints. A network is built over any set of named tensors, frozen or variable. This module never trains one.

mod activation;
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
mod pipeline;
#[cfg(test)]
mod tests;
pub mod tokenizer;
mod transformer;
pub mod unet;
pub mod vae;
mod weights;

pub use clip::ClipTextModel;
pub(crate) use config::nearest_key;
pub use denoiser::{Conditioning, Denoiser};
pub(crate) use fingerprint::text as fingerprint_text;
pub use fingerprint::{fingerprint, fingerprint_in_one, settings};
pub use pipeline::{PipelineMismatch, PipelineParts, check_fit};
pub use tokenizer::ClipTokenizer;
pub use unet::{UNet, UNetConfig};
pub use vae::{AutoencoderKl, VaeConfig};
pub use weights::{
    Weights, config_text, model_metadata, save_model, weights_file, write_safetensors,
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
    /// A folder without weights.
    #[error("{folder}: no weights found; expected {expected} (diffusers layout)")]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The file names looked for.
        expected: String,
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
    /// A key of `config.json` has a value that coffey does not build.
    #[error("{path}: \"{key}\": {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// The values that coffey builds.
        supported: String,
    },
    /// A key of `config.json` that its class does not have: misspelled, or of a model that coffey does not know.
    #[error("{path}: \"{key}\" is not a key of {class}{}", did_you_mean(*nearest))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// diffusers' class.
        class: &'static str,
        /// The key of the class with the nearest spelling.
        nearest: Option<&'static str>,
    },
    /// A tensor that the configuration needs is missing.
    #[error(
        "{origin}: tensor \"{name}\" is missing; the configuration needs it with shape {needed:?}"
    )]
    MissingTensor {
        /// The file or folder.
        origin: PathBuf,
        /// The tensor.
        name: String,
        /// The shape the configuration needs.
        needed: Vec<usize>,
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
    #[error("{origin}: tensors that the configuration has no place for: {}", names.join(", "))]
    UnexpectedTensors {
        /// The file or folder.
        origin: PathBuf,
        /// The first few of the tensors.
        names: Vec<String>,
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
