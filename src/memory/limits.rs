//! The memory of the machine, and the refusal of a plan above it.

use std::collections::BTreeMap;

use coffey_pipeline::Content;

use super::plan::{LESS, MemoryPlan, Verdict};
use super::size;
use super::sizes::{Command, Sizes};
use crate::config::Config;
use crate::process::{available_memory, total_memory};

/// A run that the machine can't hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not enough memory: {0}")]
pub struct MemoryError(pub(super) String);

/// Memory of the machine and of its devices.
#[derive(Clone, Debug, Default)]
pub struct MemoryLimits {
    /// Free main memory now. Bytes.
    pub available: Option<u64>,
    /// Main memory that this process can have at most, and the subject and verb of a sentence about it. Bytes.
    pub total: Option<(u64, &'static str)>,
    /// Memory of each CUDA device. Bytes.
    pub cards: BTreeMap<String, u64>,
}

impl MemoryLimits {
    /// The limits now. `cards`: the memory of each CUDA device that the configuration names.
    pub fn now(cards: BTreeMap<String, u64>) -> Self {
        Self {
            available: available_memory(),
            total: total_memory(),
            cards,
        }
    }

    /// The main memory that each of `processes` on this machine can have.
    #[must_use]
    pub fn shared_by(self, processes: usize) -> Self {
        let share = |bytes: u64| bytes / processes.max(1) as u64;
        Self {
            available: self.available.map(share),
            total: match (self.total, processes) {
                (Some((total, _)), 2..) => {
                    Some((share(total), "each rank's share of this machine is"))
                }
                (total, _) => total,
            },
            cards: self.cards,
        }
    }

    /// A message if `needed` bytes are more than a device has.
    pub(super) fn excess(&self, device: &str, needed: u64) -> Option<String> {
        let (has, message) = match (self.cards.get(device), self.total) {
            (Some(&has), _) => (has, format!("on {device} needed, and it has")),
            (None, Some((has, what))) if device == "cpu" => {
                (has, format!("of main memory needed, and {what}"))
            }
            _ => return None,
        };
        (needed > has).then(|| format!("about {} {message} {}", size(needed), size(has)))
    }
}

/// Refuses a run that needs more than there is, with what would fit. Returns a warning if it needs more than is free now.
///
/// # Errors
/// [`MemoryError`].
pub fn check(
    config: &Config,
    sizes: &Sizes,
    limits: &MemoryLimits,
) -> Result<Option<String>, MemoryError> {
    let plan = MemoryPlan::new(config, sizes, limits.clone());
    if let Some(excess) = plan.excess() {
        let remedy = match what_fits(config, sizes, limits).as_slice() {
            [] => format!("less is needed with {LESS}"),
            fits => format!("it fits with {}", fits.join(", or with ")),
        };
        return Err(MemoryError(format!("{excess}; {remedy}")));
    }
    match plan.verdict() {
        (Verdict::MoreThanFree, message) => Ok(Some(message)),
        _ => Ok(None),
    }
}

/// A number that decides the memory: its key, its value, its least value and step, and how it is set.
struct Setting {
    key: &'static str,
    value: usize,
    step: usize,
    set: fn(&mut Config, usize),
}

/// The settings that `command` reads.
fn settings(config: &Config, sizes: &Sizes) -> Vec<Setting> {
    let setting = |key, value, set| Setting {
        key,
        value,
        step: 1,
        set,
    };
    let mut settings = vec![match sizes.command {
        Command::Precompute => setting("encode.batch_size", config.encode.batch_size, |c, n| {
            c.encode.batch_size = n;
        }),
        Command::Train | Command::Bench => {
            setting("train.batch_size", config.train.batch_size, |c, n| {
                c.train.batch_size = n;
            })
        }
    }];
    settings.push(setting(
        "data.prefetch_batches",
        config.data.prefetch_batches,
        |c, n| c.data.prefetch_batches = n,
    ));
    if matches!(sizes.content, Content::Images) {
        settings.push(Setting {
            key: "image.resolution",
            value: config.image.resolution as usize,
            step: 8,
            set: |c, n| c.image.resolution = n as u32,
        });
    }
    if sizes.command == Command::Train {
        if let Some(validation) = &config.validation {
            settings.push(setting(
                "validation.images_per_prompt",
                validation.images_per_prompt,
                |c, n| {
                    if let Some(validation) = &mut c.validation {
                        validation.images_per_prompt = n;
                    }
                },
            ));
        }
        settings.push(setting(
            "report.endpoint_captions",
            config.report.endpoint_captions,
            |c, n| c.report.endpoint_captions = n,
        ));
    }
    settings
}

/// For each setting that alone makes the run fit, its greatest value, as `train.batch_size = 4`.
fn what_fits(config: &Config, sizes: &Sizes, limits: &MemoryLimits) -> Vec<String> {
    let greatest = |setting: &Setting| {
        let fits = |steps: usize| {
            let mut config = config.clone();
            (setting.set)(&mut config, steps * setting.step);
            MemoryPlan::new(&config, sizes, limits.clone())
                .excess()
                .is_none()
        };
        // The estimate rises with each of them.
        let (mut fitting, mut too_many) = (0, setting.value / setting.step);
        while too_many - fitting > 1 {
            let middle = fitting.midpoint(too_many);
            match fits(middle) {
                true => fitting = middle,
                false => too_many = middle,
            }
        }
        (fitting > 0).then(|| format!("{} = {}", setting.key, fitting * setting.step))
    };
    let settings = settings(config, sizes);
    settings.iter().filter_map(greatest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bench(overrides: &[&str], total: u64) -> Result<Option<String>, MemoryError> {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let config = Config::parse("[data]\nshards = \"a.tar\"\n", "a.toml", &overrides).unwrap();
        let sizes = Sizes {
            command: Command::Bench,
            ranks: 1,
            sample_bytes: None,
            content: Content::Images,
            encoders: None,
            teacher: None,
        };
        let limits = MemoryLimits {
            available: Some(total / 2),
            total: Some((total, "this machine has")),
            cards: BTreeMap::new(),
        };
        check(&config, &sizes, &limits)
    }

    #[test]
    fn refusal_names_the_greatest_values_that_fit() {
        let settings = [
            "data.decode_threads=4",
            "data.prefetch_batches=9",
            "train.batch_size=1000",
            "image.resolution=1024",
        ];
        let error = bench(&settings, 8_000_000_000).unwrap_err().to_string();
        assert!(
            error.starts_with("not enough memory: about 31.57 GB of main memory needed, and this machine has 8.00 GB"),
            "{error}"
        );
        let fits: Vec<(&str, &str)> = error
            .split("it fits with ")
            .nth(1)
            .unwrap()
            .split(", or with ")
            .map(|fit| fit.split_once(" = ").unwrap())
            .collect();
        assert_eq!(fits.len(), 3, "{error}");
        for (key, value) in fits {
            let value: usize = value.parse().unwrap();
            let step = if key == "image.resolution" { 8 } else { 1 };
            let with = |value: usize| {
                let argument = format!("{key}={value}");
                bench(&[&settings[..], &[&argument]].concat(), 8_000_000_000)
            };
            assert!(
                with(value).unwrap().is_some(),
                "{key} = {value} is no warning"
            );
            with(value + step).unwrap_err();
        }
        assert_eq!(bench(&[], 8_000_000_000), Ok(None));
    }

    #[test]
    fn refusal_without_one_remedy_lists_the_settings() {
        let error = bench(&[], 1_000_000).unwrap_err().to_string();
        assert!(
            error.contains("less is needed with a smaller train.batch_size"),
            "{error}"
        );
    }
}
