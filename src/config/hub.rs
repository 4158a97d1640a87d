//! `[hub]`: the repository the finished student is pushed to.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::limits::Limits;
use super::model_ref::is_hub_id;
use super::values::in_s3;

/// Longest name of a repository on the Hub, its user's name included. Characters.
const MAX_REPOSITORY: usize = 96;

/// `[hub]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hub {
    /// Repository of the Hub, as `user/model`; unset: no push. `--push_to_hub`, `--hub_model_id`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub push_to: Option<String>,
}

impl Hub {
    /// `output` is `train.output`.
    pub(super) fn check(
        &self,
        output: Option<&Path>,
        limits: &Limits<'_>,
    ) -> Result<(), ConfigError> {
        let Some(id) = &self.push_to else {
            return Ok(());
        };
        // The Hub's rules for the name of a new repository.
        let ok = is_hub_id(id)
            && id.len() <= MAX_REPOSITORY
            && id.split('/').all(|name| !name.ends_with(['-', '.']))
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git");
        let needs = "must be a repository of the Hub, as \"user/model\"";
        limits.check("hub.push_to", format!("{id:?}"), ok, needs)?;
        let local = !output.is_some_and(in_s3);
        let needs = "must be left out where train.output is in S3: what is pushed is read from the run's folder";
        limits.check("hub.push_to", format!("{id:?}"), local, needs)
    }
}
