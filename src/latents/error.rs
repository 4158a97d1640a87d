//! Errors of latent shards.

use coffey_pipeline::SourceError;

/// Why latent shards can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum LatentError {
    /// The place can't be read or written.
    #[error(transparent)]
    Place(Box<SourceError>),
    /// The place holds latents of another recipe.
    #[error(
        "{manifest}: the latents there were made with {field} = {written}, and now it is {now}: \
         restore it, or set latents.output to another place"
    )]
    OtherRecipe {
        /// The manifest.
        manifest: String,
        /// The value that differs.
        field: String,
        /// Its value in the manifest.
        written: String,
        /// Its value now.
        now: String,
    },
    /// The place holds a shard of the same name from another input.
    #[error(
        "{manifest}: {name} was made of {written}, and now it would be made of {now}: \
         restore data.shards, or set latents.output to another place"
    )]
    OtherSource {
        /// The manifest.
        manifest: String,
        /// The shard's file name.
        name: String,
        /// The input in the manifest.
        written: String,
        /// The input in the configuration.
        now: String,
    },
    /// A manifest can't be understood.
    #[error("{manifest}: not a manifest of latent shards that this version reads: {message}")]
    Manifest {
        /// The file.
        manifest: String,
        /// The fault.
        message: String,
    },
    /// A file has the name of a shard, and there is no manifest.
    #[error(
        "{object} is already there, and no manifest beside it says that it holds latents: \
         set latents.output to a place of its own"
    )]
    Occupied {
        /// The file.
        object: String,
    },
    /// There are no manifests to join.
    #[error("{place} holds no manifest of latent shards: check latents.output")]
    Nothing {
        /// The place without manifests.
        place: String,
    },
    /// Two inputs have the same output.
    #[error("{first} and {second} would both become {name}: write them to two places")]
    SameName {
        /// The file name.
        name: String,
        /// One input.
        first: String,
        /// The other.
        second: String,
    },
    /// An input has no file name for its output.
    #[error("{url} has no file name to call its latent shard by")]
    NoName {
        /// The input.
        url: String,
    },
    /// A value that f16 can't hold.
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
        /// The value.
        value: f32,
        /// Why f16 can't hold the value.
        reason: &'static str,
    },
    /// The numbers of samples written and read differ.
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
    /// A tensor has a wrong shape, or can't be read.
    #[error("encoded batch: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl LatentError {
    /// Whether the configuration is at fault, so that a retry can't help.
    pub fn is_config(&self) -> bool {
        match self {
            Self::OtherRecipe { .. }
            | Self::OtherSource { .. }
            | Self::Occupied { .. }
            | Self::Nothing { .. }
            | Self::SameName { .. }
            | Self::NoName { .. } => true,
            Self::Place(error) => error.is_config(),
            Self::Manifest { .. }
            | Self::NotF16 { .. }
            | Self::Miscounted { .. }
            | Self::Tensor(_) => false,
        }
    }
}

impl From<SourceError> for LatentError {
    fn from(error: SourceError) -> Self {
        Self::Place(error.into())
    }
}
