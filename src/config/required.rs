//! What each command needs besides a valid configuration: keys that have no default, and folders that exist.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::limits::quoted;
use super::model_ref::{ModelPlace, ModelRef};
use super::values::{DeviceSpec, in_s3};
use super::{Config, DataKind, Latents, Listen, Model, Resume};

/// Keys that `train` requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainRequired {
    /// `model.teacher`. If it is a folder, the folder exists.
    pub teacher: ModelRef,
    /// `train.output`: a folder, which may not exist yet, or an `s3://` prefix.
    pub output: PathBuf,
}

/// Keys that `precompute` requires.
#[derive(Debug, Clone, PartialEq)]
pub struct PrecomputeRequired {
    /// `model.teacher`. If it is a folder, the folder exists.
    pub teacher: ModelRef,
    /// `[latents]`
    pub latents: Latents,
}

impl Config {
    /// Keys that `coffey train` requires.
    ///
    /// # Errors
    /// The first key that is absent, or the folder that does not exist.
    pub fn require_train(&self) -> Result<TrainRequired, ConfigError> {
        self.require_bench()?;
        let teacher = self.require_teacher()?;
        let output = self
            .train
            .output
            .as_ref()
            .ok_or_else(|| self.missing("train.output"))?;
        if let Resume::From(checkpoint) = &self.checkpoint.resume
            && !in_s3(checkpoint)
        {
            self.require_folder("checkpoint.resume", checkpoint)?;
        }
        Ok(TrainRequired {
            teacher: teacher.clone(),
            output: output.clone(),
        })
    }

    /// Keys that `coffey precompute` requires.
    ///
    /// # Errors
    /// The first key that is absent, or the folder that does not exist.
    pub fn require_precompute(&self) -> Result<PrecomputeRequired, ConfigError> {
        self.require_bench()?;
        if self.data.kind == DataKind::Latents {
            return Err(ConfigError::Invalid {
                entry: self.origin.entry("data.kind", "\"latents\""),
                needs: "must be \"images\": latents are made of images".to_owned(),
            });
        }
        let teacher = self.require_teacher()?;
        let latents = self
            .latents
            .as_ref()
            .ok_or_else(|| self.missing("latents.output"))?;
        Ok(PrecomputeRequired {
            teacher: teacher.clone(),
            latents: latents.clone(),
        })
    }

    /// Checks what `coffey bench`, and every other command that streams, needs.
    ///
    /// # Errors
    /// The folder that does not exist.
    pub fn require_bench(&self) -> Result<(), ConfigError> {
        match &self.s3.embedded_root {
            Some(root) => self.require_folder("s3.embedded_root", root),
            None => Ok(()),
        }
    }

    /// The error for a `metrics.listen` that the system refuses because of `cause`.
    pub fn refuse_listen(&self, listen: Listen, cause: &std::io::Error) -> ConfigError {
        ConfigError::Invalid {
            entry: self
                .origin
                .entry("metrics.listen", format!("{:?}", String::from(listen))),
            needs: format!(
                "can't listen there: {cause}; choose another port, or an address of this machine (port 0 is any free one)"
            ),
        }
    }

    /// The error for a device that can't be opened because of `cause`.
    pub fn refuse_device(&self, key: &str, device: DeviceSpec, cause: impl Display) -> ConfigError {
        ConfigError::Invalid {
            entry: self.origin.entry(key, format!("{:?}", device.to_string())),
            needs: format!("can't be opened: {cause}"),
        }
    }

    fn require_teacher(&self) -> Result<&ModelRef, ConfigError> {
        let Model { teacher, vae, .. } = &self.model;
        let teacher = teacher
            .as_ref()
            .ok_or_else(|| self.missing("model.teacher"))?;
        let place = self.require_model("model.teacher", teacher)?;
        if let Some(vae) = vae {
            self.require_model("model.vae", vae)?;
        }
        let revision = &self.model.revision;
        if revision != Model::MAIN && !matches!(place, ModelPlace::Hub(_)) {
            return Err(ConfigError::Invalid {
                entry: self.origin.entry("model.revision", format!("{revision:?}")),
                needs: format!(
                    "has no effect: model.teacher = \"{teacher}\" is not taken from the Hub; remove it"
                ),
            });
        }
        Ok(teacher)
    }

    fn require_model(&self, key: &str, model: &ModelRef) -> Result<ModelPlace, ConfigError> {
        model.place().map_err(|error| ConfigError::Invalid {
            entry: self.origin.entry(key, format!("{:?}", model.as_str())),
            needs: error.to_string(),
        })
    }

    fn require_folder(&self, key: &str, folder: &Path) -> Result<(), ConfigError> {
        if folder.is_dir() {
            return Ok(());
        }
        Err(ConfigError::NoFolder {
            entry: self.origin.entry(key, quoted(folder)),
        })
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            place: self.origin.file(),
            key: key.to_owned(),
            meaning: meaning(key),
        }
    }
}

/// What to write for a key without a default, for the error that it is missing.
pub(super) fn meaning(key: &str) -> &'static str {
    match key {
        "data.shards" => r#"the URLs of the shards, as "s3://bucket/{00000..00009}.tar""#,
        "model.teacher" => {
            "the teacher in diffusers layout: a folder, s3://bucket/prefix or a Hub id as user/model"
        }
        "train.output" => {
            r#"the folder of the run, as "runs/first", or a prefix, as "s3://bucket/runs/first/""#
        }
        "latents.output" => r#"the folder for the latent shards, as "latents/first""#,
        "validation.prompts" => {
            r#"the captions to draw, as ["red apple"], or their file in validation.prompts_file"#
        }
        "audit.dir" => "the folder for the audit files",
        _ => "it has no default",
    }
}
