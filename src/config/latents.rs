//! `[latents]`: the shards that `precompute` writes; `train` ignores the table. No flags.

use std::path::PathBuf;

use coffey_pipeline::{CropMode, ImageOptions};
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, integer};
use super::limits::Limits;

/// Bounds of the numbers in `[latents]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("latents.crops", 1, 256)];

/// `[latents]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latents {
    /// Folder, or prefix in S3, for the latent shards and their manifest.
    pub output: PathBuf,
    /// What is stored of a caption.
    #[serde(default = "default_text")]
    pub text: TextKind,
    /// Random crops of each sample.
    #[serde(default = "default_crops")]
    pub crops: usize,
}

fn default_text() -> TextKind {
    TextKind::Embeds
}

fn default_crops() -> usize {
    1
}

impl Latents {
    pub(super) fn check(
        &self,
        image: &ImageOptions,
        limits: &Limits<'_>,
    ) -> Result<(), ConfigError> {
        limits.folder_or_prefix("latents.output", Some(&self.output))?;
        let random = image.crop == CropMode::Random || image.flip;
        let needs = "must be 1 where image.crop is \"center\" and image.flip false: all crops would be the same";
        limits.check(
            "latents.crops",
            self.crops,
            random || self.crops == 1,
            needs,
        )
    }
}

/// What a latent shard stores of a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextKind {
    /// Its embedding (beside the caption, for people).
    Embeds,
    /// The caption alone, to be encoded when it is trained on.
    Caption,
    /// Both, to be usable either way.
    Both,
}
