//! `LoraConfig` of PEFT, as far as it scales an adapter: in the metadata of a file by diffusers, or in `adapter_config.json`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::json;
use serde_json::{Map, Value, json};

use super::{Lora, LoraError};
use crate::models::ModelError;

/// Key of a file's metadata that holds the `LoraConfig`s of a pipeline's models (`LORA_ADAPTER_METADATA_KEY` of diffusers).
pub(super) const METADATA_KEY: &str = "lora_adapter_metadata";
/// Prefix of the UNet's keys in it.
const UNET: &str = "unet.";
/// The file of PEFT beside an adapter's weights.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";

/// The keys of PEFT's `LoraConfig` that scale an adapter.
#[derive(Debug, serde::Deserialize)]
pub(super) struct PeftConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
}

impl PeftConfig {
    /// The configuration of the UNet's adapters in a file's metadata; `None` if there is none.
    pub(super) fn of_metadata(
        metadata: &HashMap<String, String>,
        path: &Path,
    ) -> Result<Option<Self>, LoraError> {
        let Some(text) = metadata.get(METADATA_KEY) else {
            return Ok(None);
        };
        let wrong = |message: String| LoraError::Config {
            path: path.to_owned(),
            what: format!("its metadata \"{METADATA_KEY}\" is not usable: {message}"),
        };
        let all: Map<String, Value> =
            json::from_slice(text.as_bytes()).map_err(|error| wrong(error.to_string()))?;
        let of_unet = all.into_iter().filter_map(|(key, value)| {
            let key = key.strip_prefix(UNET)?.to_owned();
            Some((key, value))
        });
        let of_unet: Map<String, Value> = of_unet.collect();
        if of_unet.is_empty() {
            return Ok(None);
        }
        let config = serde_json::from_value(Value::Object(of_unet));
        config
            .map(Some)
            .map_err(|error| wrong(format!("{error}, of the keys \"{UNET}…\"")))
    }

    /// The configuration in the `adapter_config.json` beside a file; `None` if there is none.
    pub(super) fn beside(path: &Path) -> Result<Option<Self>, LoraError> {
        let path = path.with_file_name(CONFIG_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = bounded::read_file(&path, MAX_FILE_BYTES).map_err(|source| ModelError::Io {
            path: path.clone(),
            source,
        })?;
        let config = json::from_slice(&bytes);
        config.map(Some).map_err(|error| LoraError::Config {
            what: error.to_string(),
            path,
        })
    }

    /// The alpha of a module's adapter of the given rank, for the scaling alpha / rank.
    ///
    /// # Errors
    /// A message where the configuration is of another adapter.
    pub(super) fn alpha(&self, module: &str, rank: usize) -> Result<f64, String> {
        if self.use_dora {
            return Err("\"use_dora\" is set, and only LoRA is read".to_owned());
        }
        let stated = pattern(&self.rank_pattern, module)?.unwrap_or(self.r);
        if stated != rank {
            return Err(format!(
                "says rank {stated} of {module}, whose tensors have rank {rank}"
            ));
        }
        let alpha = pattern(&self.alpha_pattern, module)?.unwrap_or(self.lora_alpha);
        match self.use_rslora {
            // Its scaling is alpha / √rank.
            true => Ok(alpha * (rank as f64).sqrt()),
            false => Ok(alpha),
        }
    }
}

/// The value of the first key that a module's name matches, as PEFT's `get_pattern_key`: the name or its end. Keys are regular
/// expressions in PEFT; only names are read.
fn pattern<T: Copy>(patterns: &BTreeMap<String, T>, module: &str) -> Result<Option<T>, String> {
    for (key, value) in patterns {
        let (name, whole) = match key.strip_prefix('^') {
            Some(name) => (name, true),
            None => (key.as_str(), false),
        };
        if !name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.".contains(c))
        {
            return Err(format!(
                "has the pattern \"{key}\", and only names of modules are read"
            ));
        }
        let rest = module.strip_suffix(name);
        if rest.is_some_and(|rest| rest.is_empty() || (!whole && rest.ends_with('.'))) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The `LoraConfig` of a LoRA: `r`, `lora_alpha`, the modules, and patterns where an adapter differs.
fn config(lora: &Lora) -> Map<String, Value> {
    let adapters = || lora.adapters.values();
    let rank = most_frequent(adapters().map(super::Adapter::rank));
    let alpha = most_frequent(adapters().map(|adapter| adapter.alpha.to_bits()));
    let alpha = f64::from_bits(alpha.unwrap_or_default());
    let rank = rank.unwrap_or_default();
    let patterns = |value: &dyn Fn(&super::Adapter) -> Option<Value>| -> Map<String, Value> {
        let differing = lora.adapters.iter();
        differing
            .filter_map(|(name, adapter)| Some((format!("^{name}"), value(adapter)?)))
            .collect()
    };
    let mut config = Map::new();
    config.insert("r".into(), json!(rank));
    config.insert("lora_alpha".into(), number(alpha));
    let modules: Vec<&String> = lora.adapters.keys().collect();
    config.insert("target_modules".into(), json!(modules));
    let ranks = patterns(&|adapter| (adapter.rank() != rank).then(|| json!(adapter.rank())));
    let alphas = patterns(&|adapter| (adapter.alpha != alpha).then(|| number(adapter.alpha)));
    for (key, patterns) in [("rank_pattern", ranks), ("alpha_pattern", alphas)] {
        if !patterns.is_empty() {
            config.insert(key.into(), Value::Object(patterns));
        }
    }
    config
}

/// The value of [`METADATA_KEY`] for a LoRA.
pub(super) fn metadata(lora: &Lora) -> String {
    let config = config(lora).into_iter();
    let of_unet = config.map(|(key, value)| (format!("{UNET}{key}"), value));
    Value::Object(of_unet.collect()).to_string()
}

/// The text of PEFT's `adapter_config.json` for a LoRA.
pub(super) fn adapter_config(lora: &Lora) -> String {
    let mut whole = Map::new();
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("base_model_name_or_path", Value::Null),
        ("task_type", Value::Null),
        ("inference_mode", json!(true)),
        ("bias", json!("none")),
        ("lora_dropout", json!(0.0)),
    ] {
        whole.insert(key.to_owned(), value);
    }
    whole.extend(config(lora));
    format!("{:#}\n", Value::Object(whole))
}

/// A number of JSON, whole where it can be: PEFT declares `lora_alpha` as an integer.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

/// The most frequent of some values, the smallest of several.
pub(super) fn most_frequent<T: Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_insert(0usize) += 1;
    }
    let most = counts.values().max().copied()?;
    let mut found = counts.into_iter().filter(|(_, count)| *count == most);
    found.next().map(|(value, _)| value)
}
