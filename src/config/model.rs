//! `[model]`: the teacher and its VAE.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, integer};
use super::limits::Limits;
use super::model_ref::ModelRef;

/// Bounds of the numbers in `[model]`.
pub(super) const NUMBERS: &[Bounds] = &[integer("model.time_cond_proj_dim", 4, 65_536)];

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// The teacher in diffusers layout: a folder, an `s3://` prefix or a Hub id; every command that loads a model needs it.
    /// `--pretrained_teacher_model`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<ModelRef>,
    /// Branch, tag or commit of a teacher on the Hub. `--teacher_revision`
    pub revision: String,
    /// Another VAE, named as the teacher is; the teacher's when unset. `--pretrained_vae_model_name_or_path`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<ModelRef>,
    /// Width of the student's guidance embedding, where the teacher has none of its own; 256 if unset. Not with `[lora]`.
    /// `--unet_time_cond_proj_dim`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_cond_proj_dim: Option<usize>,
}

impl Model {
    /// The branch that every repository of the Hub has.
    pub const MAIN: &str = "main";

    /// Width of the guidance embedding of a wholly trained student.
    #[must_use]
    pub fn time_cond_proj_dim(&self) -> usize {
        self.time_cond_proj_dim.unwrap_or(256)
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        for (key, name) in [("model.teacher", &self.teacher), ("model.vae", &self.vae)] {
            let path = name.as_ref().map(|name| Path::new(name.as_str()));
            limits.path(key, path)?;
        }
        // The revision becomes a part of URLs and of paths in the Hub's cache.
        let revision = &self.revision;
        let ok = revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        });
        let needs = "must be a branch, a tag or a commit, as \"main\"";
        limits.check("model.revision", format!("{revision:?}"), ok, needs)
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            teacher: None,
            revision: Self::MAIN.to_owned(),
            vae: None,
            time_cond_proj_dim: None,
        }
    }
}
