//! Which keys may change while a run goes on: two configurations that would make different students are not one run.

use toml::{Table, Value};

use super::Config;
use super::document::flatten;
use super::values::Schedule;

/// What a key that differs means to a run that goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// It would be another run.
    Contradicts,
    /// It is meant to be changed on the way, and changes the steps that follow.
    Changes,
}

/// A key that differs between a run's configuration and the one it goes on with.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The key in full.
    pub key: String,
    /// Its value in the run so far, as TOML; `unset` if it had none.
    pub was: String,
    /// Its value now.
    pub now: String,
    /// What that means.
    pub weight: Weight,
}

/// Keys, and tables with all that is in them, which change no number of the steps: what is read or written where, how fast, and
/// what is shown. The shards are compared by the stream's cursor, however they are written down here.
const HARMLESS: &[&str] = &[
    "audit",
    "checkpoint",
    "data.cache_dir",
    "data.cache_limit_gb",
    "data.decode_threads",
    "data.max_bad_fraction",
    "data.prefetch_batches",
    "data.shards",
    "encode.batch_size",
    "encode.devices",
    "hub",
    "latents",
    "metrics",
    "report",
    "s3",
    "track",
    "train.device",
    "train.gradient_checkpointing",
    "train.output",
    "train.scratch",
    "train.stall_timeout",
    "validation",
];

/// What a person may turn while a run goes on, as when the loss is no longer finite.
const CHANGING: &[&str] = &["optimizer.learning_rate", "optimizer.max_grad_norm"];

fn is_one_of(key: &str, list: &[&str]) -> bool {
    list.iter().any(|known| {
        key.strip_prefix(known)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

impl Config {
    /// What differs from the configuration a run was made with so far (its TOML) and matters, in the order of the keys. Keys
    /// that `earlier` does not have yet count with their defaults.
    ///
    /// # Errors
    /// In words, when `earlier` can't be read.
    pub fn differences(&self, earlier: &str) -> Result<Vec<Difference>, String> {
        let earlier: Self = toml::from_str(earlier).map_err(|error| error.to_string())?;
        let (mut was, mut now) = (Vec::new(), Vec::new());
        for (config, keys) in [(&earlier, &mut was), (self, &mut now)] {
            let table = Table::try_from(config).map_err(|error| error.to_string())?;
            flatten("", &table, keys);
        }
        let value = |keys: &[(String, Value)], key: &str| {
            let found = keys.iter().find(|(known, _)| known == key);
            found.map_or_else(|| "unset".to_owned(), |(_, value)| value.to_string())
        };
        let mut keys: Vec<&String> = was.iter().chain(&now).map(|(key, _)| key).collect();
        keys.sort();
        keys.dedup();
        Ok(keys
            .into_iter()
            .filter_map(|key| {
                let (was, now) = (value(&was, key), value(&now, key));
                let weight = self.weight(key)?;
                (was != now).then(|| Difference {
                    key: key.clone(),
                    was,
                    now,
                    weight,
                })
            })
            .collect())
    }

    fn weight(&self, key: &str) -> Option<Weight> {
        let ends_with_the_run = !matches!(
            self.optimizer.schedule,
            Schedule::Constant | Schedule::ConstantWithWarmup
        );
        if key == "train.max_steps" {
            return ends_with_the_run.then_some(Weight::Changes);
        }
        match is_one_of(key, HARMLESS) {
            true => None,
            false if is_one_of(key, CHANGING) => Some(Weight::Changes),
            false => Some(Weight::Contradicts),
        }
    }
}
