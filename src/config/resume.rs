//! The keys that may change when a run resumes. A change that would make another student is refused.

use toml::{Table, Value};

use super::Config;
use super::parse::flatten;

/// The effect of a changed key on a run that resumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeEffect {
    /// The result would be that of another run: refused.
    OtherRun,
    /// The result would be that of another run if there are other models at the new place.
    OtherPlaceOfModels,
    /// The change is allowed, and changes the steps that follow.
    LaterSteps,
}

/// A key that differs between the configuration in a checkpoint and the configuration it is resumed with.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The key in full.
    pub key: String,
    /// Its value in the checkpoint, as TOML; `unset` if it had none.
    pub was: String,
    /// Its value now.
    pub now: String,
    /// The effect on the run.
    pub effect: ResumeEffect,
}

/// Keys, and whole tables, that change no number of the steps: where data is read and results are written, how fast, and
/// what is shown. The stream's cursor compares the shards, however `data.shards` is written, and the number of lanes.
const WITHOUT_EFFECT: &[&str] = &[
    "audit",
    "checkpoint",
    "data.cache_dir",
    "data.cache_limit_gb",
    "data.check_shards",
    "data.decode_threads",
    "data.http_headers",
    "data.lanes",
    "data.max_bad_fraction",
    "data.prefetch_batches",
    "data.shards",
    "encode.batch_size",
    "encode.devices",
    "hub",
    "latents",
    "metrics",
    "mpi",
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

/// Keys that may be changed on purpose in the middle of a run, as when the loss is no longer finite.
const ADJUSTABLE: &[&str] = &["optimizer.learning_rate", "optimizer.max_grad_norm"];

/// Keys that say where the models are.
const PLACES_OF_MODELS: &[&str] = &["model.revision", "model.teacher", "model.vae"];

fn is_one_of(key: &str, list: &[&str]) -> bool {
    list.iter().any(|known| {
        key.strip_prefix(known)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

impl Config {
    /// Keys with an effect on the run that differ from `earlier`, the TOML of a checkpoint's configuration, sorted by key. A key
    /// that `earlier` lacks has its default.
    ///
    /// # Errors
    /// A message, when `earlier` can't be parsed.
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
                let effect = self.effect(key)?;
                (was != now).then(|| Difference {
                    key: key.clone(),
                    was,
                    now,
                    effect,
                })
            })
            .collect())
    }

    /// The effect of a change of `key`; `None` for a key without effect.
    fn effect(&self, key: &str) -> Option<ResumeEffect> {
        if key == "train.max_steps" {
            let effect = self.optimizer.schedule.depends_on_max_steps();
            return effect.then_some(ResumeEffect::LaterSteps);
        }
        if is_one_of(key, WITHOUT_EFFECT) {
            None
        } else if is_one_of(key, ADJUSTABLE) {
            Some(ResumeEffect::LaterSteps)
        } else if is_one_of(key, PLACES_OF_MODELS) {
            Some(ResumeEffect::OtherPlaceOfModels)
        } else {
            Some(ResumeEffect::OtherRun)
        }
    }
}
