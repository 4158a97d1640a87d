//! Reading `config.json`: typed keys with diffusers' defaults, and a refusal by name of what coffey does not build.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Number, Value};

use super::activation::Activation;
use super::weights::read_json;
use super::{ModelError, did_you_mean};

/// A class of diffusers and the keys its `config.json` may have.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) name: &'static str,
    pub(super) keys: &'static [&'static str],
}

/// Numbers that are accepted, far above those of known models: what such a configuration needs fits into integers and is compared
/// with the weights before anything is allocated.
pub(super) mod range {
    use std::ops::RangeInclusive;

    /// Channels of a feature map and widths of embeddings.
    pub(in crate::models) const WIDTH: RangeInclusive<usize> = 1..=65_536;
    /// Blocks and layers one after another.
    pub(in crate::models) const LAYERS: RangeInclusive<usize> = 1..=1000;
    /// Term that keeps a norm's division finite.
    pub(in crate::models) const EPS: RangeInclusive<f64> = 0.0..=1.0;
    /// Divisors and factors.
    pub(in crate::models) const FACTOR: RangeInclusive<f64> = 1e-6..=1e6;
    /// Resolutions of a network, each half of the one before.
    pub(super) const LEVELS: RangeInclusive<usize> = 1..=10;
}

/// Keys that diffusers' `EMAModel.save_pretrained` adds to the configuration of the averaged model.
const EMA_KEYS: [&str; 7] = [
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
];

/// A model's `config.json`, kept whole so that it can be written back.
///
/// The methods that read a key record its fault and return a default instead; [`ConfigFile::finish`] returns all faults at once.
#[derive(Clone, Debug)]
pub(super) struct ConfigFile {
    path: PathBuf,
    pub(super) map: Map<String, Value>,
    faults: RefCell<Vec<String>>,
}

impl ConfigFile {
    pub(super) fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let map = read_json(&path)?;
        let file = Self {
            path,
            map,
            faults: RefCell::default(),
        };
        file.only("quantization_config", &[]);
        Ok(file)
    }

    /// Reads the configuration of a model of `class`. Another class is refused. Keys that the class lacks are ignored, as in diffusers,
    /// with a warning; a misspelled key of the class is a fault.
    pub(super) fn read_class(folder: &Path, class: &Class) -> Result<Self, ModelError> {
        let file = Self::read(folder)?;
        file.only("_class_name", &[Value::from(class.name)]);
        if !file.faults.borrow().is_empty() {
            return file.finish(Ok(file.clone()));
        }
        let known = |key: &str| {
            // Keys with a leading underscore are notes of the library that wrote the file.
            key.starts_with('_')
                || class.keys.contains(&key)
                || EMA_KEYS.contains(&key)
                || key == "quantization_config"
        };
        let mut ignored = Vec::new();
        for key in file.map.keys().filter(|key| !known(key)) {
            let quoted = format!("\"{key}\"");
            match nearest_key(key, class.keys) {
                None => ignored.push(quoted),
                nearest => file.fault(format!(
                    "{quoted} is not a key of {}{}",
                    class.name,
                    did_you_mean(nearest)
                )),
            }
        }
        if !ignored.is_empty() {
            let (path, keys) = (file.path.display(), ignored.join(", "));
            warn_once(format!(
                "{path}: {keys}: not a key of {}, ignored as diffusers does",
                class.name
            ));
        }
        Ok(file)
    }

    /// Removes the keys that the class lacks, which diffusers' constructors refuse.
    pub(super) fn only_keys_of(mut map: Map<String, Value>, class: &Class) -> Map<String, Value> {
        map.retain(|key, _| key.starts_with('_') || class.keys.contains(&key.as_str()));
        map
    }

    /// Records a fault.
    fn fault(&self, message: String) {
        self.faults.borrow_mut().push(message);
    }

    /// What was built, or the error with all faults.
    pub(super) fn finish<T>(&self, built: Result<T, ModelError>) -> Result<T, ModelError> {
        let mut faults = self.faults.borrow().clone();
        let value = match built {
            Ok(value) if faults.is_empty() => return Ok(value),
            Err(error) if faults.is_empty() => return Err(error),
            built => built,
        };
        match value {
            Err(ModelError::Config { message, .. }) => faults.push(message),
            Err(other) => return Err(other),
            Ok(_) => {}
        }
        Err(self.invalid(faults.join("; ")))
    }

    /// The value of a key; JSON null counts as absent.
    fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A key with its default. Null is a fault: in diffusers it does not stand for the default.
    pub(super) fn get<T: serde::de::DeserializeOwned>(&self, key: &str, default: T) -> T {
        if self.is_null(key) {
            self.fault(format!("\"{key}\" must not be null"));
        }
        self.optional(key).unwrap_or(default)
    }

    /// Whether a key is present and null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// A key that may be absent or null.
    pub(super) fn optional<T: serde::de::DeserializeOwned>(&self, key: &str) -> Option<T> {
        let value = self.value(key)?;
        match serde_json::from_value(value.clone()) {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(format!("\"{key}\": {error}, but it is {value}"));
                None
            }
        }
    }

    /// The activation that a key names.
    pub(super) fn activation(&self, key: &str) -> Option<Activation> {
        let name = self.optional::<String>(key)?;
        let activation = Activation::of_diffusers(&name);
        if activation.is_none() {
            self.refuse(key, format!("\"{name}\""), Activation::DIFFUSERS);
        }
        activation
    }

    /// A whole number in `range`.
    pub(super) fn whole(&self, key: &str, default: usize, range: RangeInclusive<usize>) -> usize {
        let number = self.get(key, Number::from(default));
        let found = number.as_u64().and_then(|n| usize::try_from(n).ok());
        found.filter(|n| range.contains(n)).unwrap_or_else(|| {
            self.refuse_number(key, number, &range);
            default
        })
    }

    /// A number in `range`.
    pub(super) fn real(&self, key: &str, default: f64, range: RangeInclusive<f64>) -> f64 {
        let number: f64 = self.get(key, default);
        if range.contains(&number) {
            return number;
        }
        self.refuse_number(key, number, &range);
        default
    }

    /// Refuses a number that is not in `range`.
    pub(super) fn refuse_number<T: Display>(
        &self,
        key: &str,
        found: impl Display,
        range: &RangeInclusive<T>,
    ) {
        self.refuse(key, found, numbers(range));
    }

    /// `norm_num_groups`, which must divide `channels`.
    pub(super) fn groups(&self, channels: &[usize]) -> usize {
        let groups = self.whole("norm_num_groups", 32, range::WIDTH);
        if channels.iter().any(|c| c % groups != 0) {
            let known = format!("a divisor of every one of {channels:?}");
            self.refuse("norm_num_groups", groups, known);
        }
        groups
    }

    /// Refuses a key with any but the supported values; an absent key passes.
    pub(super) fn only(&self, key: &str, supported: &[Value]) {
        match self.value(key) {
            Some(value) if !supported.contains(value) => {
                let known = match supported {
                    [] => "null".to_owned(),
                    some => Vec::from_iter(some.iter().map(Value::to_string)).join(", "),
                };
                self.refuse(key, value, known);
            }
            _ => {}
        }
    }

    /// `block_out_channels`: the channels of each level, one or more numbers above 0.
    pub(super) fn levels(&self, default: &[usize]) -> Result<Vec<usize>, ModelError> {
        const KEY: &str = "block_out_channels";
        let before = self.faults.borrow().len();
        let channels: Vec<usize> = self.get(KEY, default.to_vec());
        let count = channels.len();
        if !range::LEVELS.contains(&count) || channels.iter().any(|c| !range::WIDTH.contains(c)) {
            let shown = &channels[..count.min(*range::LEVELS.end())];
            let (most, each) = (range::LEVELS.end(), numbers(&range::WIDTH));
            let known = format!("a list of 1 to {most} {each}");
            self.refuse(KEY, format!("{shown:?}"), known);
        }
        if self.faults.borrow().len() > before {
            // All other lists have as many entries, so nothing more can be said.
            return self.finish(Ok(channels));
        }
        Ok(channels)
    }

    pub(super) fn invalid(&self, message: String) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            message,
        }
    }

    /// Records a key whose value is not supported.
    pub(super) fn refuse(&self, key: &str, found: impl Display, supported: impl Display) {
        self.fault(unsupported(key, found, supported));
    }

    /// An error that names a key, its value and the supported values.
    pub(super) fn unsupported(
        &self,
        key: &str,
        found: impl Display,
        supported: impl Display,
    ) -> ModelError {
        self.invalid(unsupported(key, found, supported))
    }
}

/// The numbers in a range, for a message.
pub(crate) fn numbers<T: Display>(range: &RangeInclusive<T>) -> String {
    format!("numbers from {} to {}", range.start(), range.end())
}

fn unsupported(key: &str, found: impl Display, supported: impl Display) -> String {
    format!("\"{key}\": {found} is not supported; supported: {supported}")
}

/// Prints a warning, the first time that it is given: commands read a configuration more than once.
pub(crate) fn warn_once(message: String) {
    static GIVEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    if !given.contains(&message) {
        errln!("warning: {message}");
        given.insert(message);
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
