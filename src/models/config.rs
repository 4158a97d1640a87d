//! Reading `config.json`: typed keys with diffusers' defaults, and a refusal by name of what coffey does not build.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ModelError;
use super::weights::read_json;

/// A model's `config.json`, kept whole so that it can be written back.
#[derive(Clone, Debug)]
pub(super) struct ConfigFile {
    path: PathBuf,
    pub(super) map: Map<String, Value>,
}

impl ConfigFile {
    pub(super) fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let map = read_json(&path)?;
        Ok(Self { path, map })
    }

    /// The value of a key; JSON null counts as absent.
    fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A key with its default.
    pub(super) fn get<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
        default: T,
    ) -> Result<T, ModelError> {
        self.optional(key).map(|v| v.unwrap_or(default))
    }

    /// A key that may be absent or null.
    pub(super) fn optional<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<Option<T>, ModelError> {
        self.value(key)
            .map(|value| {
                serde_json::from_value(value.clone()).map_err(|e| ModelError::Config {
                    path: self.path.clone(),
                    message: format!("\"{key}\": {e}"),
                })
            })
            .transpose()
    }

    /// A key without a default.
    pub(super) fn required<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<T, ModelError> {
        self.optional(key)?.ok_or_else(|| ModelError::Config {
            path: self.path.clone(),
            message: format!("key \"{key}\" is missing"),
        })
    }

    /// Refuses a key that is there with any but the supported values.
    pub(super) fn only(&self, key: &str, supported: &[Value]) -> Result<(), ModelError> {
        match self.value(key) {
            Some(value) if !supported.contains(value) => Err(self.unsupported(
                key,
                value,
                match supported {
                    [] => "null".to_owned(),
                    some => some
                        .iter()
                        .map(Value::to_string)
                        .collect::<Vec<_>>()
                        .join(", "),
                },
            )),
            _ => Ok(()),
        }
    }

    /// Refuses a list of `block_out_channels` that describes no network.
    pub(super) fn refuse_levels(&self, channels: &[usize]) -> Result<(), ModelError> {
        match channels.is_empty() || channels.contains(&0) {
            true => Err(self.unsupported(
                "block_out_channels",
                format!("{channels:?}"),
                "one or more numbers above 0",
            )),
            false => Ok(()),
        }
    }

    /// An error that names a key, its value and what would be right.
    pub(super) fn unsupported(
        &self,
        key: &str,
        found: impl std::fmt::Display,
        supported: impl Into<String>,
    ) -> ModelError {
        ModelError::Unsupported {
            path: self.path.clone(),
            key: key.to_owned(),
            found: found.to_string(),
            supported: supported.into(),
        }
    }
}
