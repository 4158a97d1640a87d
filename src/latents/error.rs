//! What can be wrong with a folder of latent shards.

use std::io;
use std::path::{Path, PathBuf};

/// Why latent shards can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LatentError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The folder holds latents made in another way.
    #[error(
        "{manifest}: the latents there were made with {field} = {written}, and now it is {now}: \
         restore it, or set latents.output to another folder"
    )]
    OtherRecipe {
        /// The manifest that says so.
        manifest: PathBuf,
        /// What differs.
        field: String,
        /// Its value in the manifest.
        written: String,
        /// Its value now.
        now: String,
    },
    /// The folder holds a shard of the same name made of another input.
    #[error(
        "{manifest}: {name} was made of {written}, and now it would be made of {now}: \
         restore data.shards, or set latents.output to another folder"
    )]
    OtherSource {
        /// The manifest that says so.
        manifest: PathBuf,
        /// The shard's file name.
        name: String,
        /// The input it was made of.
        written: String,
        /// The input it would be made of now.
        now: String,
    },
    /// A manifest can't be understood.
    #[error("{path}: not a manifest of latent shards that this version reads: {message}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file stands where a shard should go, and no manifest says that it is a latent shard.
    #[error(
        "{path} is already there, and no manifest beside it says that it holds latents: \
         set latents.output to a folder of its own"
    )]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// Two inputs would become one output.
    #[error("{first} and {second} would both become {name}: write them to two folders")]
    SameName {
        /// The file name.
        name: String,
        /// One input.
        first: String,
        /// The other.
        second: String,
    },
    /// An input has no file name to give to its output.
    #[error("{url} has no file name to call its latent shard by")]
    NoName {
        /// The input.
        url: String,
    },
    /// A number that f16 can't hold.
    #[error(
        "{shard}: sample {key}: the {what} hold {value}, {reason}; nothing of this shard is kept"
    )]
    NotF16 {
        /// The input shard.
        shard: String,
        /// The sample.
        key: String,
        /// `moments` or `prompt embeddings`.
        what: &'static str,
        /// The number.
        value: f32,
        /// Why it can't be stored.
        reason: &'static str,
    },
    /// What was written is not what the stream says it sent.
    #[error(
        "{shard}: {written} samples were written and {expected} were read, by a fault in coffey"
    )]
    Miscounted {
        /// The input shard.
        shard: String,
        /// Samples in the output.
        written: u64,
        /// Samples in the stream's summary.
        expected: u64,
    },
    /// A tensor has another shape than announced, or can't be read.
    #[error("encoded batch: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl LatentError {
    /// Whether the configuration is at fault, so that running again as it is can't help.
    pub fn is_config(&self) -> bool {
        match self {
            Self::OtherRecipe { .. }
            | Self::OtherSource { .. }
            | Self::Occupied { .. }
            | Self::SameName { .. }
            | Self::NoName { .. } => true,
            Self::Io { .. }
            | Self::Manifest { .. }
            | Self::NotF16 { .. }
            | Self::Miscounted { .. }
            | Self::Tensor(_) => false,
        }
    }

    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
