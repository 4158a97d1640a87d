//! The check of values against each other and against what a number's bounds don't say. Each table states its limits in its own
//! file, with the helpers here.

use std::fmt::Display;
use std::path::Path;

use super::error::{ConfigError, KeyValue};
use super::parse::Origin;
use super::required;
use super::values::{DeviceSpec, in_s3};
use super::{Config, image, s3};

/// Checks every value, table by table.
pub(super) fn check(config: &Config) -> Result<(), ConfigError> {
    let limits = &Limits {
        origin: &config.origin,
    };
    config.data.check(limits)?;
    s3::check(&config.s3, limits)?;
    image::check(&config.image, limits)?;
    config.model.check(limits)?;
    config.encode.check(limits)?;
    config.distill.check(limits)?;
    if let Some(lora) = &config.lora {
        lora.check(limits)?;
        check_full_only(config, limits)?;
    }
    config.optimizer.check(limits)?;
    config.train.check(limits)?;
    config.check_lanes(limits)?;
    config.checkpoint.check(limits)?;
    config.track.check(limits)?;
    if let Some(validation) = &config.validation {
        validation.check(limits)?;
    }
    config.report.check(config.validation.as_ref(), limits)?;
    config.mpi.check(limits)?;
    config.hub.check(config.train.output.as_deref(), limits)?;
    if let Some(latents) = &config.latents {
        latents.check(&config.image, limits)?;
    }
    if let Some(audit) = &config.audit {
        audit.check(limits)?;
    }
    Ok(())
}

/// Refuses the keys of a wholly trained UNet beside `[lora]`.
fn check_full_only(config: &Config, limits: &Limits<'_>) -> Result<(), ConfigError> {
    let (decay, width) = (config.distill.ema_decay, config.model.time_cond_proj_dim);
    let needs = "does not go with [lora], whose target is the student itself; remove one of them";
    let key = "distill.ema_decay";
    limits.check(key, decay.unwrap_or_default(), decay.is_none(), needs)?;
    let needs = "does not go with [lora], whose student has the teacher's network without a guidance embedding; remove one of them";
    let key = "model.time_cond_proj_dim";
    limits.check(key, width.unwrap_or_default(), width.is_none(), needs)
}

/// Checks of single values; each error says where the key was written.
pub(super) struct Limits<'a> {
    origin: &'a Origin,
}

impl Limits<'_> {
    /// `key` with its value, for an error.
    pub(super) fn entry(&self, key: &str, value: impl Display) -> Box<KeyValue> {
        self.origin.entry(key, value)
    }

    /// Refuses `value` unless it is `ok`. `needs` completes the sentence "`key` …".
    pub(super) fn check(
        &self,
        key: &str,
        value: impl Display,
        ok: bool,
        needs: &str,
    ) -> Result<(), ConfigError> {
        if ok {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            entry: self.entry(key, value),
            needs: needs.to_owned(),
        })
    }

    /// Refuses the absence of a key without a default, at the line of its table.
    pub(super) fn written(&self, key: &str) -> Result<(), ConfigError> {
        if self.origin.has(key) {
            return Ok(());
        }
        let table = key.split('.').next().unwrap_or(key);
        Err(ConfigError::Missing {
            place: self.origin.place(table),
            key: key.to_owned(),
            meaning: required::meaning(key),
        })
    }

    /// Refuses an empty list, and a list with an empty word.
    pub(super) fn words(&self, key: &str, words: &[String]) -> Result<(), ConfigError> {
        let ok = !words.is_empty() && words.iter().all(|word| !word.trim().is_empty());
        let needs = "must name at least one, and none of them empty";
        self.check(key, format!("{words:?}"), ok, needs)
    }

    /// Refuses an empty path.
    pub(super) fn path(&self, key: &str, path: Option<&Path>) -> Result<(), ConfigError> {
        let empty = path.is_some_and(|path| path.as_os_str().is_empty());
        self.check(key, "\"\"", !empty, "must not be empty")
    }

    /// Refuses an empty path, and an S3 prefix without a bucket.
    pub(super) fn folder_or_prefix(
        &self,
        key: &str,
        path: Option<&Path>,
    ) -> Result<(), ConfigError> {
        self.path(key, path)?;
        let Some(path) = path.filter(|path| in_s3(path)) else {
            return Ok(());
        };
        let text = path.to_string_lossy();
        let bucket = text.trim_start_matches("s3://").split('/').next();
        let ok = bucket.is_some_and(|bucket| !bucket.is_empty());
        let needs = "must name a bucket, as \"s3://bucket/runs/first/\"";
        self.check(key, quoted(path), ok, needs)
    }

    /// Refuses a device that this binary was not built for.
    pub(super) fn device(&self, key: &str, device: DeviceSpec) -> Result<(), ConfigError> {
        if device == DeviceSpec::Cpu || cfg!(feature = "cuda") {
            return Ok(());
        }
        Err(ConfigError::WithoutFeature {
            entry: self.entry(key, format!("{:?}", device.to_string())),
            what: "CUDA",
            instead: "use \"cpu\"",
            feature: "cuda",
        })
    }
}

/// A path as a TOML string.
pub(super) fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
