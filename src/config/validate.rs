//! Every limit on a value, in one place, and what each command needs besides.

use std::fmt::Display;
use std::path::Path;

use super::decode::required_meaning;
use super::document::Origin;
use super::error::ConfigError;
use super::input;
use super::model_ref::{ModelPlace, ModelRef, is_hub_id};
use super::values::{DataKind, DeviceSpec, Listen, Resume, Schedule, TextFrom, in_s3};
use super::{
    Config, Crop, Data, Distill, Encode, Filter, Image, Latents, Model, Optimizer, Report, S3,
    Train, Validation,
};

/// Timesteps of the noise schedule of every teacher there is; the solver's points divide it evenly.
const TRAIN_TIMESTEPS: usize = 1000;
/// Downscaling of the largest UNet and VAE pairs' first level: the side of a square must divide by it.
const RESOLUTION_STEP: usize = 8;
/// Sampling steps beyond which a latent consistency model has no timesteps left.
const MAX_SAMPLING_STEPS: usize = 50;
/// Length of a repository's name on the Hub, its user's included.
const MAX_REPOSITORY: usize = 96;

/// What `train` can't do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainPaths<'a> {
    /// The teacher; a folder exists.
    pub teacher: &'a ModelRef,
    /// The run's folder, which may not exist yet, or an `s3://` prefix.
    pub output: &'a Path,
}

/// What `precompute` can't do without.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecomputePaths<'a> {
    /// The model that encodes; a folder exists.
    pub teacher: &'a ModelRef,
    /// What to write, and where.
    pub latents: &'a Latents,
}

impl Config {
    /// What `coffey train` needs besides a valid configuration.
    ///
    /// # Errors
    /// Names the first key that is absent, or the folder that does not exist.
    pub fn require_train(&self) -> Result<TrainPaths<'_>, ConfigError> {
        self.require_bench()?;
        let teacher = self.require_teacher()?;
        let output = self
            .train
            .output
            .as_deref()
            .ok_or_else(|| self.missing("train.output"))?;
        if let Resume::From(checkpoint) = &self.checkpoint.resume
            && !in_s3(checkpoint)
        {
            self.require_folder("checkpoint.resume", checkpoint)?;
        }
        Ok(TrainPaths { teacher, output })
    }

    /// What `coffey precompute` needs besides a valid configuration.
    ///
    /// # Errors
    /// Names the first key that is absent, or the folder that does not exist.
    pub fn require_precompute(&self) -> Result<PrecomputePaths<'_>, ConfigError> {
        self.require_bench()?;
        if self.data.kind == DataKind::Latents {
            return Err(ConfigError::Invalid {
                entry: self.origin.entry("data.kind", "\"latents\""),
                needs: "must be \"images\": latents are made of images".to_owned(),
            });
        }
        let teacher = self.require_teacher()?;
        let latents = self
            .latents
            .as_ref()
            .ok_or_else(|| self.missing("latents.output"))?;
        Ok(PrecomputePaths { teacher, latents })
    }

    /// What `coffey bench`, and everything else that streams, needs besides a valid configuration.
    ///
    /// # Errors
    /// Names the folder that does not exist.
    pub fn require_bench(&self) -> Result<(), ConfigError> {
        match &self.s3.embedded_root {
            Some(root) => self.require_folder("s3.embedded_root", root),
            None => Ok(()),
        }
    }

    /// What is wrong with `metrics.listen` when the system does not let this process listen there.
    pub fn refuse_listen(&self, listen: Listen, cause: &std::io::Error) -> ConfigError {
        ConfigError::Invalid {
            entry: self
                .origin
                .entry("metrics.listen", format!("{:?}", String::from(listen))),
            needs: format!(
                "can't listen there: {cause}; choose another port, or an address of this machine (port 0 is any free one)"
            ),
        }
    }

    fn require_teacher(&self) -> Result<&ModelRef, ConfigError> {
        let Model { teacher, vae, .. } = &self.model;
        let teacher = teacher
            .as_ref()
            .ok_or_else(|| self.missing("model.teacher"))?;
        let place = self.require_model("model.teacher", teacher)?;
        if let Some(vae) = vae {
            self.require_model("model.vae", vae)?;
        }
        let revision = &self.model.revision;
        if revision != Model::MAIN && !matches!(place, ModelPlace::Hub(_)) {
            return Err(ConfigError::Invalid {
                entry: self.origin.entry("model.revision", format!("{revision:?}")),
                needs: format!(
                    "has no effect: model.teacher = \"{teacher}\" is not taken from the Hub; remove it"
                ),
            });
        }
        Ok(teacher)
    }

    fn require_model(&self, key: &str, model: &ModelRef) -> Result<ModelPlace, ConfigError> {
        model.place().map_err(|error| ConfigError::Invalid {
            entry: self.origin.entry(key, format!("{:?}", model.as_str())),
            needs: error.to_string(),
        })
    }

    fn require_folder(&self, key: &str, folder: &Path) -> Result<(), ConfigError> {
        if folder.is_dir() {
            return Ok(());
        }
        Err(ConfigError::NoFolder {
            entry: self.origin.entry(key, quoted(folder)),
        })
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            place: self.origin.file(),
            key: key.to_owned(),
            meaning: required_meaning(key),
        }
    }
}

/// A word as TOML has it.
fn word(word: TextFrom) -> String {
    toml::Value::try_from(word).map_or_else(|_| format!("{word:?}"), |word| word.to_string())
}

fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

/// Checks every value against its limits.
pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let check = Check {
        origin: &config.origin,
    };
    check.data(&config.data)?;
    check.s3(&config.s3)?;
    check.image(&config.image)?;
    check.model(&config.model)?;
    check.encode(&config.encode)?;
    check.distill(&config.distill)?;
    check.optimizer(&config.optimizer)?;
    check.train(&config.train)?;
    check.positive("checkpoint.every", config.checkpoint.every)?;
    check.positive("checkpoint.keep", config.checkpoint.keep as u64)?;
    if let Resume::From(checkpoint) = &config.checkpoint.resume {
        check.place("checkpoint.resume", Some(checkpoint))?;
        let ok = !in_s3(checkpoint) || checkpoint.components().count() > 2;
        let needs = "must name a checkpoint, as \"s3://bucket/runs/first/checkpoint-200\"";
        check.that("checkpoint.resume", quoted(checkpoint), ok, needs)?;
    }
    if let Some(validation) = &config.validation {
        check.validation(validation)?;
    }
    check.report(&config.report, config.validation.as_ref())?;
    if let Some(id) = &config.hub.push_to {
        // What the Hub takes for the name of a new repository.
        let ok = is_hub_id(id)
            && id.len() <= MAX_REPOSITORY
            && id.split('/').all(|name| !name.ends_with(['-', '.']))
            && !id.contains("--")
            && !id.contains("..")
            && !id.ends_with(".git");
        let needs = "must be a repository of the Hub, as \"user/model\"";
        check.that("hub.push_to", format!("{id:?}"), ok, needs)?;
        let local = !config.train.output.as_deref().is_some_and(in_s3);
        let needs = "must be left out where train.output is in S3: what is pushed is read from the run's folder";
        check.that("hub.push_to", format!("{id:?}"), local, needs)?;
    }
    if let Some(latents) = &config.latents {
        check.place("latents.output", Some(&latents.output))?;
        check.positive("latents.crops", latents.crops as u64)?;
        let random = config.image.crop == Crop::Random || config.image.flip;
        let needs = "must be 1 where image.crop is \"center\" and image.flip false: all crops would be the same";
        let crops = latents.crops.to_string();
        check.that("latents.crops", crops, random || latents.crops == 1, needs)?;
    }
    if let Some(audit) = &config.audit {
        check.place("audit.dir", Some(&audit.dir))?;
        check.positive("audit.steps", audit.steps)?;
    }
    Ok(())
}

struct Check<'a> {
    origin: &'a Origin,
}

impl Check<'_> {
    fn data(&self, data: &Data) -> Result<(), ConfigError> {
        self.words("data.shards", &data.shards)?;
        self.words("data.image_keys", &data.image_keys)?;
        self.words("data.caption_keys", &data.caption_keys)?;
        match (data.kind, data.text_from) {
            (DataKind::Images, Some(from)) => {
                let needs = "has no effect with data.kind = \"images\", whose captions are encoded; remove it";
                self.that("data.text_from", word(from), false, needs)?;
            }
            (DataKind::Images, None) => {}
            (DataKind::Latents, _) => {
                for (key, keys, default) in [
                    ("data.image_keys", &data.image_keys, input::image_keys()),
                    (
                        "data.caption_keys",
                        &data.caption_keys,
                        input::caption_keys(),
                    ),
                ] {
                    let needs = "has no effect with data.kind = \"latents\", whose members have fixed names; remove it";
                    self.that(key, format!("{keys:?}"), *keys == default, needs)?;
                }
            }
        }
        if let Some(samples) = data.max_samples {
            self.positive("data.max_samples", samples)?;
        }
        self.positive("data.shuffle_buffer", data.shuffle_buffer as u64)?;
        self.positive("data.shuffle_buffer_mb", data.shuffle_buffer_mb)?;
        self.positive("data.open_shards", data.open_shards as u64)?;
        self.positive("data.decode_threads", data.decode_threads as u64)?;
        self.positive("data.prefetch_batches", data.prefetch_batches as u64)?;
        self.path("data.cache_dir", data.cache_dir.as_deref())?;
        self.positive("data.cache_limit_gb", data.cache_limit_gb)?;
        self.fraction("data.max_bad_fraction", data.max_bad_fraction)?;
        data.filter
            .as_ref()
            .map_or(Ok(()), |filter| self.filter(filter))
    }

    fn filter(&self, filter: &Filter) -> Result<(), ConfigError> {
        if let Some(fraction) = filter.max_pwatermark {
            self.fraction("data.filter.max_pwatermark", fraction)?;
        }
        if let Some(fraction) = filter.max_punsafe {
            self.fraction("data.filter.max_punsafe", fraction)?;
        }
        if let Some(cosine) = filter.min_similarity {
            let ok = (-1.0..=1.0).contains(&cosine);
            self.that(
                "data.filter.min_similarity",
                cosine,
                ok,
                "must be between -1 and 1",
            )?;
        }
        if let Some(score) = filter.min_aesthetic {
            let ok = score.is_finite();
            self.that(
                "data.filter.min_aesthetic",
                score,
                ok,
                "must be a finite number",
            )?;
        }
        if let (Some(min), Some(max)) = (filter.min_caption_chars, filter.max_caption_chars) {
            let needs = format!("must not be above data.filter.max_caption_chars = {max}");
            self.that("data.filter.min_caption_chars", min, min <= max, &needs)?;
        }
        Ok(())
    }

    fn s3(&self, s3: &S3) -> Result<(), ConfigError> {
        self.positive("s3.max_attempts", s3.max_attempts.into())?;
        if let Some(url) = &s3.endpoint_url {
            let ok = url.starts_with("http://") || url.starts_with("https://");
            let needs = "must start with http:// or https://";
            self.that("s3.endpoint_url", format!("{url:?}"), ok, needs)?;
        }
        self.path("s3.ca_bundle", s3.ca_bundle.as_deref())?;
        self.path("s3.embedded_root", s3.embedded_root.as_deref())?;
        if let Some(root) = &s3.embedded_root {
            let value = quoted(root);
            let needs = "can't be used together with s3.endpoint_url: remove one of them";
            self.that("s3.embedded_root", &value, s3.endpoint_url.is_none(), needs)?;
            if !cfg!(feature = "embedded-s3") {
                return Err(ConfigError::WithoutFeature {
                    entry: self.origin.entry("s3.embedded_root", value),
                    what: "the embedded S3 server",
                    instead: "set s3.endpoint_url",
                    feature: "embedded-s3",
                });
            }
        }
        Ok(())
    }

    fn image(&self, image: &Image) -> Result<(), ConfigError> {
        let side = image.resolution;
        let ok = side > 0 && side.is_multiple_of(RESOLUTION_STEP);
        let needs = format!("must be a multiple of {RESOLUTION_STEP}, 8 or more");
        self.that("image.resolution", side, ok, &needs)
    }

    fn model(&self, model: &Model) -> Result<(), ConfigError> {
        for (key, name) in [("model.teacher", &model.teacher), ("model.vae", &model.vae)] {
            let path = name.as_ref().map(|name| Path::new(name.as_str()));
            self.path(key, path)?;
        }
        // It becomes a part of URLs and of paths in the Hub's cache.
        let revision = &model.revision;
        let ok = revision.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        });
        let needs = "must be a branch, a tag or a commit, as \"main\"";
        self.that("model.revision", format!("{revision:?}"), ok, needs)?;
        let width = model.time_cond_proj_dim;
        let needs = "must be 4 or more";
        self.that("model.time_cond_proj_dim", width, width >= 4, needs)
    }

    fn encode(&self, encode: &Encode) -> Result<(), ConfigError> {
        let needs = r#"needs at least one device, as ["cpu"]"#;
        self.that("encode.devices", "[]", !encode.devices.is_empty(), needs)?;
        for (index, device) in encode.devices.iter().enumerate() {
            self.device(&format!("encode.devices[{index}]"), *device)?;
        }
        self.positive("encode.batch_size", encode.batch_size as u64)
    }

    fn distill(&self, distill: &Distill) -> Result<(), ConfigError> {
        let points = distill.num_ddim_timesteps;
        let ok = points > 0 && TRAIN_TIMESTEPS.is_multiple_of(points);
        let needs = format!("must divide {TRAIN_TIMESTEPS} evenly, as 50 does");
        self.that("distill.num_ddim_timesteps", points, ok, &needs)?;
        self.not_negative("distill.w_min", distill.w_min)?;
        self.not_negative("distill.w_max", distill.w_max)?;
        let needs = format!("must not be above distill.w_max = {}", distill.w_max);
        let ok = distill.w_min <= distill.w_max;
        self.that("distill.w_min", distill.w_min, ok, &needs)?;
        self.above_zero("distill.huber_c", distill.huber_c)?;
        self.above_zero("distill.timestep_scaling", distill.timestep_scaling)?;
        self.fraction("distill.ema_decay", distill.ema_decay)?;
        self.fraction(
            "distill.proportion_empty_prompts",
            distill.proportion_empty_prompts,
        )
    }

    fn optimizer(&self, optimizer: &Optimizer) -> Result<(), ConfigError> {
        self.above_zero("optimizer.learning_rate", optimizer.learning_rate)?;
        for (key, beta) in [
            ("optimizer.beta1", optimizer.beta1),
            ("optimizer.beta2", optimizer.beta2),
        ] {
            let needs = "must be 0 or more and below 1";
            self.that(key, beta, (0.0..1.0).contains(&beta), needs)?;
        }
        self.not_negative("optimizer.weight_decay", optimizer.weight_decay)?;
        self.above_zero("optimizer.epsilon", optimizer.epsilon)?;
        self.above_zero("optimizer.max_grad_norm", optimizer.max_grad_norm)?;
        let steps = optimizer.warmup_steps;
        let ok = steps == 0 || optimizer.schedule != Schedule::Constant;
        let needs = r#"has no effect with optimizer.schedule = "constant"; use another, as "constant_with_warmup""#;
        self.that("optimizer.warmup_steps", steps, ok, needs)
    }

    fn train(&self, train: &Train) -> Result<(), ConfigError> {
        self.place("train.output", train.output.as_deref())?;
        self.path("train.scratch", train.scratch.as_deref())?;
        self.device("train.device", train.device)?;
        self.positive("train.max_steps", train.max_steps)?;
        self.positive("train.batch_size", train.batch_size as u64)?;
        self.positive(
            "train.gradient_accumulation",
            train.gradient_accumulation as u64,
        )?;
        self.positive("train.stall_timeout", train.stall_timeout)
    }

    fn validation(&self, validation: &Validation) -> Result<(), ConfigError> {
        self.positive("validation.every", validation.every)?;
        let needs = r#"needs at least one caption, as ["red apple"]"#;
        self.that(
            "validation.prompts",
            "[]",
            !validation.prompts.is_empty(),
            needs,
        )?;
        let steps = validation.steps;
        let ok = (1..=MAX_SAMPLING_STEPS).contains(&steps);
        let needs = format!("must be between 1 and {MAX_SAMPLING_STEPS}");
        self.that("validation.steps", steps, ok, &needs)?;
        self.not_negative("validation.guidance", validation.guidance)?;
        self.positive(
            "validation.images_per_prompt",
            validation.images_per_prompt as u64,
        )
    }

    fn report(&self, report: &Report, validation: Option<&Validation>) -> Result<(), ConfigError> {
        self.positive("report.endpoint_every", report.endpoint_every)?;
        self.not_negative("report.guidance", report.guidance)?;
        let needs = "needs captions to draw: set validation.prompts";
        let ok = !report.grid || validation.is_some();
        self.that("report.grid", report.grid, ok, needs)
    }

    fn that(
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
            entry: self.origin.entry(key, value),
            needs: needs.to_owned(),
        })
    }

    fn positive(&self, key: &str, value: u64) -> Result<(), ConfigError> {
        self.that(key, value, value >= 1, "must be 1 or more")
    }

    fn fraction(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        let ok = (0.0..=1.0).contains(&value);
        self.that(key, value, ok, "must be between 0 and 1")
    }

    fn above_zero(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        let ok = value > 0.0 && value.is_finite();
        self.that(key, value, ok, "must be a finite number above 0")
    }

    fn not_negative(&self, key: &str, value: f64) -> Result<(), ConfigError> {
        let ok = value >= 0.0 && value.is_finite();
        self.that(key, value, ok, "must be a finite number, 0 or more")
    }

    /// A list with something in it, and nothing empty.
    fn words(&self, key: &str, words: &[String]) -> Result<(), ConfigError> {
        let ok = !words.is_empty() && words.iter().all(|word| !word.trim().is_empty());
        self.that(
            key,
            format!("{words:?}"),
            ok,
            "must name at least one, and none of them empty",
        )
    }

    fn path(&self, key: &str, path: Option<&Path>) -> Result<(), ConfigError> {
        let empty = path.is_some_and(|path| path.as_os_str().is_empty());
        self.that(key, "\"\"", !empty, "must not be empty")
    }

    /// A folder, or a prefix in S3.
    fn place(&self, key: &str, path: Option<&Path>) -> Result<(), ConfigError> {
        self.path(key, path)?;
        let Some(path) = path.filter(|path| in_s3(path)) else {
            return Ok(());
        };
        let text = path.to_string_lossy();
        let bucket = text.trim_start_matches("s3://").split('/').next();
        let ok = bucket.is_some_and(|bucket| !bucket.is_empty());
        let needs = "must name a bucket, as \"s3://bucket/runs/first/\"";
        self.that(key, quoted(path), ok, needs)
    }

    fn device(&self, key: &str, device: DeviceSpec) -> Result<(), ConfigError> {
        if device == DeviceSpec::Cpu || cfg!(feature = "cuda") {
            return Ok(());
        }
        Err(ConfigError::WithoutFeature {
            entry: self.origin.entry(key, format!("{:?}", device.to_string())),
            what: "CUDA",
            instead: "use \"cpu\"",
            feature: "cuda",
        })
    }
}
