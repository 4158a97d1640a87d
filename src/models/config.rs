//! Reading `config.json`: typed keys with diffusers' defaults, and a refusal by name of what coffey does not build.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ModelError;
use super::activation::Activation;
use super::weights::read_json;

/// A class of diffusers and the keys its `config.json` may have.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) name: &'static str,
    pub(super) keys: &'static [&'static str],
}

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

    /// Reads the configuration of a model of `class`: another class and keys the class does not have are refused.
    pub(super) fn read_class(folder: &Path, class: &Class) -> Result<Self, ModelError> {
        let file = Self::read(folder)?;
        file.only("_class_name", &[Value::from(class.name)])?;
        // Keys with a leading underscore are notes of the library that wrote the file.
        let unknown = |key: &&String| !key.starts_with('_') && !class.keys.contains(&key.as_str());
        match file.map.keys().find(unknown) {
            None => Ok(file),
            Some(key) => Err(ModelError::UnknownKey {
                path: file.path,
                key: key.clone(),
                class: class.name,
                nearest: nearest_key(key, class.keys),
            }),
        }
    }

    /// The value of a key; JSON null counts as absent.
    fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A key with its default. Null is refused: in diffusers it does not stand for the default.
    pub(super) fn get<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
        default: T,
    ) -> Result<T, ModelError> {
        if self.is_null(key) {
            return Err(self.invalid(format!("\"{key}\" must not be null")));
        }
        self.optional(key).map(|v| v.unwrap_or(default))
    }

    /// Whether a key is present and null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// A key that may be absent or null.
    pub(super) fn optional<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<Option<T>, ModelError> {
        self.value(key)
            .map(|value| {
                serde_json::from_value(value.clone())
                    .map_err(|e| self.invalid(format!("\"{key}\": {e}, but it is {value}")))
            })
            .transpose()
    }

    /// The activation that a key names.
    pub(super) fn activation(&self, key: &str) -> Result<Option<Activation>, ModelError> {
        let Some(name) = self.optional::<String>(key)? else {
            return Ok(None);
        };
        match Activation::of_diffusers(&name) {
            Some(activation) => Ok(Some(activation)),
            None => Err(self.unsupported(key, format!("\"{name}\""), Activation::DIFFUSERS)),
        }
    }

    /// A number that must be above 0.
    pub(super) fn positive(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        match self.get(key, default)? {
            0 => Err(self.unsupported(key, 0, "a number above 0")),
            n => Ok(n),
        }
    }

    /// `norm_num_groups`, which must divide `channels`.
    pub(super) fn groups(&self, channels: &[usize]) -> Result<usize, ModelError> {
        let groups: usize = self.get("norm_num_groups", 32)?;
        if groups == 0 || channels.iter().any(|c| c % groups != 0) {
            let known = format!("a divisor of every one of {channels:?}");
            return Err(self.unsupported("norm_num_groups", groups, known));
        }
        Ok(groups)
    }

    /// Refuses a key with any but the supported values; an absent key passes.
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
        if channels.is_empty() || channels.contains(&0) {
            let found = format!("{channels:?}");
            return Err(self.unsupported(
                "block_out_channels",
                found,
                "one or more numbers above 0",
            ));
        }
        Ok(())
    }

    pub(super) fn invalid(&self, message: String) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            message,
        }
    }

    /// An error that names a key, its value and the supported values.
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

/// The known key of the nearest spelling, if one is near.
pub(crate) fn nearest_key(key: &str, known: &[&'static str]) -> Option<&'static str> {
    /// Least Jaro-Winkler similarity of a misspelled key.
    const NEAR: f64 = 0.8;
    known
        .iter()
        .map(|known| (*known, strsim::jaro_winkler(known, key)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .filter(|(_, likeness)| *likeness >= NEAR)
        .map(|(known, _)| known)
}
