//! The configuration: one TOML file plus `-s key=value` overrides, turned into structs whose every value is in range.
//!
//! This module owns the keys, their defaults, their limits and the messages for a mistake. It opens no file but the
//! configuration and `validation.prompts_file`, and does not decide what a value is used for.
//!
//! Each table has a file of its name with its keys, defaults and limits; `[s3]`, `[image]` and `[data.filter]` are option types of
//! [`coffey_pipeline`]. `bounds` refuses
//! numbers out of range, `parse` turns text into structs, `limits` checks the values, `required` checks what one
//! command needs besides, `sdxl` changes defaults for that model, and `resume` compares the configuration with that of a checkpoint.

mod audit;
mod bounds;
mod checkpoint;
mod data;
mod distill;
mod encode;
mod error;
mod hub;
mod image;
mod lanes;
mod latents;
mod limits;
mod lora;
mod metrics;
mod model;
mod model_ref;
mod mpi;
mod optimizer;
mod parse;
mod report;
mod required;
mod resume;
mod s3;
mod sdxl;
#[cfg(test)]
mod tests;
mod track;
mod train;
mod validation;
mod values;

use std::path::Path;

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::text::escaped;
use coffey_pipeline::{ImageOptions, S3Options};
use serde::{Deserialize, Serialize};

pub use audit::Audit;
pub use bounds::MAX_GUIDANCE;
pub use checkpoint::{Checkpoint, Resume};
pub use data::{Data, DataKind, MicroConditioning, TextFrom};
pub use distill::{Distill, LossKind, ObjectiveKind, TCD_GAMMA, Uncond};
pub use encode::Encode;
pub use error::{ConfigError, KeyValue, WrittenAt};
pub use hub::Hub;
pub use image::MAX_RESOLUTION;
pub use latents::{Latents, TextKind};
pub use lora::{Lora, LoraLayout};
pub use metrics::{Listen, Metrics};
pub use model::Model;
pub use model_ref::{ModelPlace, ModelRef, ModelRefError};
pub use mpi::MpiConfig;
pub use optimizer::{Optimizer, OptimizerKind, Schedule};
use parse::Origin;
pub use report::Report;
pub use required::{PrecomputeRequired, TrainRequired};
pub use resume::{Difference, ResumeEffect};
pub use track::Track;
pub use train::{MixedPrecision, Train};
pub use validation::Validation;
pub use values::{DeviceSpec, FloatType, in_s3};

/// A whole configuration, valid and with every default filled in.
///
/// It serialises to text that [`Config::parse`] reads. Where each value was written is kept for the messages of
/// `require_*`; it is neither serialised nor compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `[data]`
    #[serde(default)]
    pub data: Data,
    /// `[s3]`
    #[serde(default)]
    pub s3: S3Options,
    /// `[image]`
    #[serde(default)]
    pub image: ImageOptions,
    /// `[model]`
    #[serde(default)]
    pub model: Model,
    /// `[encode]`
    #[serde(default)]
    pub encode: Encode,
    /// `[distill]`
    #[serde(default)]
    pub distill: Distill,
    /// `[lora]`; absent: the whole UNet is trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// `[optimizer]`
    #[serde(default)]
    pub optimizer: Optimizer,
    /// `[train]`
    #[serde(default)]
    pub train: Train,
    /// `[checkpoint]`
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// `[validation]`; absent: no grids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// `[report]`
    #[serde(default)]
    pub report: Report,
    /// `[track]`
    #[serde(default)]
    pub track: Track,
    /// `[metrics]`
    #[serde(default)]
    pub metrics: Metrics,
    /// `[mpi]`
    #[serde(default)]
    pub mpi: MpiConfig,
    /// `[hub]`
    #[serde(default)]
    pub hub: Hub,
    /// `[latents]`; `precompute` needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latents: Option<Latents>,
    /// `[audit]`; absent: no audit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    #[serde(skip)]
    origin: Origin,
}

impl Config {
    /// Reads the file at `path` and lays `overrides`, each `key=value`, over it in order. `validation.prompts` has the captions of
    /// `validation.prompts_file`.
    ///
    /// # Errors
    /// The first mistake found, with the file, the key and what would be right.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let file = escaped(&path.display().to_string()).into_owned();
        let text =
            bounded::read_text_file(path, MAX_FILE_BYTES).map_err(|source| ConfigError::Read {
                file: file.clone(),
                source,
            })?;
        let mut config = Self::parse(&text, &file, overrides)?;
        if let Some(validation) = &mut config.validation {
            validation.read_prompts(&config.origin)?;
        }
        Ok(config)
    }

    /// Reads a configuration from `text`; messages call it `file_name`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, file_name: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut config = parse::parse(text, file_name, overrides)?;
        limits::check(&config)?;
        config.fill();
        Ok(config)
    }

    /// Writes the defaults that depend on other keys.
    fn fill(&mut self) {
        self.data.text_from = self.data.latents();
        self.distill.fill();
        match &mut self.lora {
            None => {
                self.model.time_cond_proj_dim = Some(self.model.time_cond_proj_dim());
                self.distill.ema_decay = Some(self.distill.ema_decay());
            }
            Some(lora) => {
                lora.fill();
                if let Some(validation) = &mut self.validation
                    && !self.origin.has("validation.guidance")
                {
                    validation.guidance = lora::GUIDANCE;
                }
                if !self.origin.has("optimizer.learning_rate") {
                    self.optimizer.learning_rate = lora::LEARNING_RATE;
                }
            }
        }
    }

    /// Whether `key` is in the file or in an override.
    pub fn is_written(&self, key: &str) -> bool {
        self.origin.has(key)
    }

    /// The configuration with every default written out, as TOML.
    ///
    /// # Errors
    /// A number beyond what TOML can hold, which no parsed configuration has.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}
