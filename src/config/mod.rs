//! The configuration: one TOML file plus `-s key=value` overrides, turned into structs whose every value is in range.
//!
//! This module owns the keys, their defaults, their limits and the words in which a mistake is explained. It never
//! opens anything but the file itself and never decides what a value is used for.
//!
//! A file goes through five passes, each in its own file: text and overrides become one table that knows where each
//! key was written (`document`); keys nobody reads are refused (`keys`), and so are values whose feature is not built
//! yet (`unbuilt`); the table becomes structs (`decode`); the values are checked (`validate`).

mod decode;
mod document;
mod error;
mod input;
mod keys;
mod made_with;
mod model_ref;
mod models;
mod reports;
mod resume;
#[cfg(test)]
mod tests;
mod training;
mod unbuilt;
mod validate;
mod values;

use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Value;

use document::{Document, Origin};
pub use error::{ConfigError, Entry, Place};
pub use input::{Data, Filter, Image, S3};
pub use model_ref::{ModelPlace, ModelRef, ModelRefError};
pub use models::{Distill, Encode, Model};
pub use reports::{Audit, Hub, Latents, Metrics, Report, Track, Validation};
pub use resume::{Difference, Weight};
pub use training::{Checkpoint, Optimizer, Train};
pub use validate::{PrecomputePaths, TrainPaths};
pub use values::{
    Attention, Crop, DataKind, DeviceSpec, FloatType, Interpolation, Listen, LossKind,
    MixedPrecision, OptimizerKind, Resume, Schedule, TextFrom, TextKind, in_s3,
};

/// A whole configuration, valid and with every default filled in.
///
/// It serialises to what [`Config::parse`] reads. Where each value was written is kept for the messages of
/// `require_*`, but is neither serialised nor compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `[data]`
    pub data: Data,
    /// `[s3]`
    #[serde(default)]
    pub s3: S3,
    /// `[image]`
    #[serde(default)]
    pub image: Image,
    /// `[model]`
    #[serde(default)]
    pub model: Model,
    /// `[encode]`
    #[serde(default)]
    pub encode: Encode,
    /// `[distill]`
    #[serde(default)]
    pub distill: Distill,
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
    /// Reads the file at `path` and lays `overrides`, each `key=value`, over it in order.
    ///
    /// # Errors
    /// The first mistake found, with the file, the key and what would be right.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            file: file.clone(),
            source,
        })?;
        Self::parse(&text, &file, overrides)
    }

    /// Reads a configuration from `text`; messages call it `file_name`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, file_name: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let document = Document::parse(text, file_name, overrides)?;
        keys::refuse_unknown(&document)?;
        unbuilt::refuse(&document)?;
        let Document {
            mut root,
            mut origin,
        } = document;
        origin.note(&root);
        // So that an empty file is told about the key it lacks, not about a table.
        root.entry("data")
            .or_insert_with(|| Value::Table(toml::Table::new()));
        let mut config: Self = decode::decode(&Value::Table(root), &origin)?;
        config.origin = origin;
        validate::validate(&config)?;
        config.data.text_from = config.data.latents();
        Ok(config)
    }

    /// The configuration with every default written out, as TOML.
    ///
    /// # Errors
    /// A number beyond what TOML can hold, which no parsed configuration has.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}
