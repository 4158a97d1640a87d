//! Faults of LoRA files.

use std::path::PathBuf;

use crate::models::ModelError;

/// Why a LoRA could not be read, written or merged.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// A file can't be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A file without adapters of a UNet.
    #[error("{}: has no adapter of a UNet{found}", path.display())]
    NoAdapters {
        /// The file.
        path: PathBuf,
        /// The file's content, as the end of the message.
        found: String,
    },
    /// A tensor that belongs to no layout of LoRA files.
    #[error("{}: tensor \"{tensor}\" {what}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The fault and what would be right.
        what: String,
    },
    /// The LoRA belongs to another model.
    #[error(
        "{}: tensor \"{tensor}\" belongs to no module of the UNet (nor do {others} others of {all} tensors); give the base model \
         that the LoRA was trained on", path.display()
    )]
    UnknownModule {
        /// The file.
        path: PathBuf,
        /// The first tensor without a module.
        tensor: String,
        /// Number of further ones.
        others: usize,
        /// Number of tensors in the file.
        all: usize,
    },
    /// The alphas that the file's metadata or the `adapter_config.json` beside it gives are not usable.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The fault and what would be right.
        what: String,
    },
    /// A value does not fit the type that is written.
    #[error("{name}: has values that are no numbers of {dtype}; write the LoRA as f32 or bf16")]
    Overflow {
        /// The tensor.
        name: String,
        /// The type.
        dtype: &'static str,
    },
    /// A target names no module, or none of the targets does.
    #[error(
        "lora.targets: {target:?} names no layer of the UNet; name layers in full, as {example:?}, or the end of their names, as \
         \"to_q\""
    )]
    Target {
        /// The target.
        target: String,
        /// A layer of the UNet.
        example: String,
    },
    /// The base model has no tensor for an adapter.
    #[error("the base model has no tensor \"{name}\" of shape {shape:?}, which an adapter changes")]
    NoBase {
        /// The tensor.
        name: String,
        /// The shape of the adapter's change.
        shape: Vec<usize>,
    },
    /// The decomposition of an adapter did not converge.
    #[error("the singular values of the adapter of {module} do not converge")]
    NoSvd {
        /// The module.
        module: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
