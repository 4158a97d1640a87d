//! Valid configurations.

mod numbers;
mod refusals;

use std::path::Path;

use coffey_pipeline::{CropMode, Interpolation};

use super::*;
use crate::config::parse::known_keys;

const MINIMAL: &str = "[data]\nshards = \"s3://bucket/{0..3}.tar\"\n";

fn parse(text: &str, overrides: &[&str]) -> Result<Config, ConfigError> {
    let overrides: Vec<_> = overrides.iter().map(ToString::to_string).collect();
    Config::parse(text, "a.toml", &overrides)
}

fn with(overrides: &[&str]) -> Config {
    parse(MINIMAL, overrides).unwrap()
}

#[test]
fn config_defaults() {
    let config = with(&[]);
    assert_eq!(config.data.shown_shards(), "s3://bucket/{0..3}.tar");
    assert_eq!(config.data.kind, DataKind::Images);
    assert_eq!(config.data.image_keys, ["jpg", "png", "jpeg", "webp"]);
    assert_eq!(config.data.caption_keys, ["text", "txt", "caption"]);
    assert_eq!(config.data.max_samples, None);
    assert!(config.data.resample_shards);
    assert_eq!(config.data.shuffle_buffer, 1000);
    assert_eq!(
        (config.data.open_shards, config.data.prefetch_batches),
        (4, 4)
    );
    assert!(config.data.decode_threads >= 1);
    assert!((config.data.max_bad_fraction - 0.05).abs() < 1e-12);
    assert_eq!(
        (config.data.cache_dir, config.data.cache_limit_gb),
        (None, 500)
    );
    assert_eq!(config.data.filter, None);
    assert_eq!(config.s3, S3Options::default());
    assert_eq!(config.s3.max_attempts, 10);
    assert_eq!(config.image.resolution, 512);
    assert_eq!(config.image.interpolation, Interpolation::Bilinear);
    assert_eq!(config.image.crop, CropMode::Random);
    assert_eq!(config.model.time_cond_proj_dim, Some(256));
    assert_eq!(config.encode.devices, [DeviceSpec::Cpu]);
    assert_eq!(config.encode.batch_size, 32);
    assert_eq!(config.distill.num_ddim_timesteps, 50);
    assert_eq!(config.distill.loss, LossKind::Huber);
    assert_eq!(config.optimizer.kind, OptimizerKind::AdamW);
    assert_eq!(config.optimizer.schedule, Schedule::Constant);
    assert_eq!(config.train.device, DeviceSpec::Cpu);
    assert_eq!(
        (config.train.max_steps, config.train.batch_size),
        (1000, 12)
    );
    assert_eq!(config.train.mixed_precision, MixedPrecision::No);
    assert_eq!(config.train.seed, 453_645_634);
    assert_eq!(config.train.stall_timeout, 1800);
    assert!(config.track.tensorboard);
    assert_eq!((config.checkpoint.every, config.checkpoint.keep), (200, 10));
    assert_eq!(config.checkpoint.resume, Resume::Latest);
    assert_eq!(
        (config.validation, config.latents, config.audit),
        (None, None, None)
    );
    assert_eq!(config.report.endpoint_captions, 0);
    assert!(!config.report.grid);
}

#[test]
fn partial_tables_get_defaults() {
    let config = with(&[
        "validation.prompts=['red apple']",
        "latents.output=latents/a",
        "audit.dir=runs/a/audit",
        "data.filter.max_pwatermark=0.5",
    ]);
    let validation = config.validation.unwrap();
    assert_eq!(
        (
            validation.every,
            validation.steps,
            validation.images_per_prompt
        ),
        (200, 4, 4)
    );
    let latents = config.latents.unwrap();
    assert_eq!((latents.text, latents.crops), (TextKind::Embeds, 1));
    assert_eq!(config.audit.unwrap().steps, 4);
    let filter = config.data.filter.unwrap();
    assert_eq!((filter.max_pwatermark, filter.min_size), (Some(0.5), None));
}

#[test]
fn overrides_take_toml_values_and_bare_words() {
    let config = with(&[
        "train.max_steps=10",
        "optimizer.learning_rate = 3e-4",
        "distill.w_min=2",
        "image.flip=true",
        "train.output=runs/first run",
        "model.teacher=\"a folder\"",
        "checkpoint.resume=runs/a/checkpoint-5",
        "data.shards=[\"a.tar\", 'b.tar']",
        "s3={ region = \"eu-west-1\", anonymous = true }",
        "s3.max_attempts=3",
        "encode.devices=[\"cpu\", \"cpu\"]",
        "image.interpolation=nearest_exact",
        "image.scaled_decode=false",
        "train.max_steps=11",
    ]);
    assert_eq!(config.train.max_steps, 11);
    assert!((config.optimizer.learning_rate - 3e-4).abs() < 1e-12);
    assert!((config.distill.w_min - 2.0).abs() < 1e-12);
    assert!(config.image.flip);
    assert_eq!(
        config.train.output.as_deref(),
        Some(Path::new("runs/first run"))
    );
    assert_eq!(config.model.teacher.unwrap().as_str(), "a folder");
    assert_eq!(
        config.checkpoint.resume,
        Resume::From("runs/a/checkpoint-5".into())
    );
    assert_eq!(config.data.shown_shards(), "a.tar, b.tar");
    assert_eq!(config.s3.region.as_deref(), Some("eu-west-1"));
    assert_eq!((config.s3.anonymous, config.s3.max_attempts), (true, 3));
    assert_eq!(config.encode.devices, [DeviceSpec::Cpu; 2]);
    assert_eq!(config.image.interpolation, Interpolation::Nearest);
    assert!(!config.image.scaled_decode);
}

#[test]
fn override_takes_precedence_over_the_file() {
    let config = parse(
        "[train]\nmax_steps = 5\n",
        &["data.shards=a.tar", "train.max_steps=6"],
    );
    assert_eq!(config.unwrap().train.max_steps, 6);
}

#[test]
fn required_keys_are_returned() {
    let config = with(&[
        "model.teacher=.",
        "train.output=runs/a",
        "latents.output=latents/a",
    ]);
    let required = config.require_train().unwrap();
    assert_eq!(required.teacher.as_str(), ".");
    assert_eq!(required.output, Path::new("runs/a"));
    let required = config.require_precompute().unwrap();
    assert_eq!(required.latents.output, Path::new("latents/a"));
}

#[test]
fn limits_are_inclusive() {
    with(&[
        "data.max_bad_fraction=1",
        "distill.w_min=15",
        "distill.ema_decay=0",
        "distill.num_ddim_timesteps=1000",
        "image.resolution=8",
        "optimizer.schedule=constant_with_warmup",
        "optimizer.warmup_steps=5",
        "train.seed=9223372036854775807",
    ]);
}

#[cfg(feature = "cuda")]
#[test]
fn cuda_devices_are_read() {
    let config = with(&[
        "train.device=cuda:0",
        "encode.devices=[\"cuda:0\", \"cuda:1\"]",
    ]);
    assert_eq!(config.train.device, DeviceSpec::Cuda(0));
    assert_eq!(
        config.encode.devices,
        [DeviceSpec::Cuda(0), DeviceSpec::Cuda(1)]
    );
}

#[test]
fn devices_and_resume_round_trip() {
    for text in ["cpu", "cuda:0", "cuda:12"] {
        assert_eq!(text.parse::<DeviceSpec>().unwrap().to_string(), text);
    }
    for text in ["", "cuda", "cuda:", "cuda:x", "CPU", "cuda:-1"] {
        assert!(text.parse::<DeviceSpec>().is_err(), "{text}");
    }
    for text in ["latest", "never", "runs/a/checkpoint-5"] {
        assert_eq!(String::from(Resume::from(text.to_owned())), text);
    }
}

#[test]
fn built_words_are_accepted() {
    with(&[
        "data.kind=images",
        "encode.dtype=f16",
        "encode.vae_dtype=bf16",
        "train.gradient_checkpointing=true",
        "train.attention=plain",
        "train.mixed_precision=no",
        "train.teacher_dtype=bf16",
        "train.tf32=true",
        "metrics.listen=127.0.0.1:9464",
        "latents={output=\"a\",crops=1}",
    ]);
}

#[test]
fn config_toml_round_trips() {
    let config = with(&[
        "model.teacher=teacher",
        "train.output=runs/a",
        "checkpoint.resume=runs/a/checkpoint-5",
        "validation.prompts=['red apple']",
        "latents.output=latents/a",
        "audit.dir=audit",
        "metrics.listen=\"[::1]:0\"",
        "hub.push_to=user/model",
        "data.filter.min_size=64",
        "data.cache_dir=cache",
        "data.cache_limit_gb=20",
        "data.check_shards=false",
        "data.http_headers=['https://h Authorization: Bearer ${TOKEN}']",
        "s3.ca_bundle=authority.pem",
        "image.interpolation=nearest_exact",
    ]);
    let text = config.to_toml().unwrap();
    let again = Config::parse(&text, "b.toml", &[]).unwrap();
    assert_eq!(config, again);
}

#[cfg(feature = "embedded-s3")]
#[test]
fn shipped_configurations_parse() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            // Those for a GPU parse in every binary once their devices are overridden.
            let cpu = ["train.device=cpu", "encode.devices=[\"cpu\"]"].map(str::to_owned);
            let config = Config::load(&path, &cpu).unwrap_or_else(|error| panic!("{error}"));
            assert!(config.model.teacher.is_some(), "{}", path.display());
            assert!(
                config.train.output.is_some() || config.latents.is_some(),
                "{}",
                path.display()
            );
            seen += 1;
        }
    }
    assert!(seen >= 5, "only {seen} configurations in configs/");
}

#[test]
fn prompts_of_a_file_become_those_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.toml");
    let prompts = folder.path().join("prompts.txt");
    let set = format!("validation.prompts_file={}", prompts.display());
    std::fs::write(&file, MINIMAL).unwrap();
    std::fs::write(&prompts, "red apple\n\n# 7\n").unwrap();
    let load = || Config::load(&file, std::slice::from_ref(&set));
    let config = load().unwrap();
    let validation = config.validation.clone().unwrap();
    assert_eq!(validation.prompts, ["red apple", "# 7"]);
    assert_eq!(validation.prompts_file, None);
    // A resume from the run's own configuration does not depend on the file.
    let again = Config::parse(&config.to_toml().unwrap(), "b.toml", &[]).unwrap();
    assert_eq!(again, config);
    std::fs::write(&prompts, b"red apple\n\xff\n").unwrap();
    let message = load().unwrap_err().to_string();
    let start = format!(
        "-s {set}: key validation.prompts_file = \"{}\": line 2 ",
        prompts.display()
    );
    assert!(message.starts_with(&start), "{message}");
}

#[test]
fn every_key_is_documented() {
    let page = include_str!("../../../docs/configuration.md");
    for key in known_keys() {
        assert!(
            page.contains(&format!("| `{key}` |")),
            "docs/configuration.md has no row for {key}"
        );
    }
}

#[test]
fn differences_tell_other_runs_from_allowed_changes() {
    let run = with(&["model.teacher=\"a/b\"", "train.output=\"runs/a\""]);
    let toml = run.to_toml().unwrap();
    let found = |overrides: &[&str]| {
        let all = [
            &["model.teacher=\"a/b\"", "train.output=\"s3://b/c\""],
            overrides,
        ];
        let differences = with(&all.concat()).differences(&toml).unwrap();
        let told = differences.into_iter();
        told.map(|d| (d.key, d.was, d.now, d.effect))
            .collect::<Vec<_>>()
    };
    let same = [
        "train.max_steps=7",
        "train.device=cpu",
        "checkpoint.every=3",
        "checkpoint.background=false",
        "validation.prompts=[\"a\"]",
        "report.endpoint_captions=3",
        "metrics.listen=\"127.0.0.1:0\"",
        "s3.region=\"eu\"",
        "data.decode_threads=9",
        "data.cache_dir=\"c\"",
        "encode.batch_size=2",
    ];
    assert_eq!(found(&same), []);
    let one = |key: &str, was: &str, now: &str, effect| {
        (key.to_owned(), was.to_owned(), now.to_owned(), effect)
    };
    assert_eq!(
        found(&["image.resolution=64", "train.seed=3", "data.max_samples=5"]),
        [
            one("data.max_samples", "unset", "5", ResumeEffect::OtherRun),
            one("image.resolution", "512", "64", ResumeEffect::OtherRun),
            one("train.seed", "453645634", "3", ResumeEffect::OtherRun),
        ]
    );
    assert_eq!(
        found(&["model.teacher=\"a/c\"", "optimizer.learning_rate=0.5"]),
        [
            one(
                "model.teacher",
                "\"a/b\"",
                "\"a/c\"",
                ResumeEffect::OtherPlaceOfModels
            ),
            one(
                "optimizer.learning_rate",
                "0.000001",
                "0.5",
                ResumeEffect::LaterSteps
            ),
        ]
    );
    // A schedule that ends with the run.
    let toml = with(&["optimizer.schedule=cosine"]).to_toml().unwrap();
    let longer = with(&["optimizer.schedule=cosine", "train.max_steps=2000"]);
    let differences = longer.differences(&toml).unwrap();
    assert_eq!(differences.len(), 1);
    assert_eq!(differences[0].effect, ResumeEffect::LaterSteps);
    // A key that an earlier version lacked has its default.
    let older = toml.replace("flip = false\n", "");
    assert_ne!(older, toml);
    let same = with(&["optimizer.schedule=cosine"]);
    assert_eq!(same.differences(&older).unwrap(), []);
    // A key that a later version added is ignored.
    let newer = toml.replace("[image]\n", "[image]\nadded_later = 1\n");
    assert_ne!(newer, toml);
    assert_eq!(same.differences(&newer).unwrap(), []);
    assert!(same.differences("data = 3").is_err());
}

#[test]
fn s3_prefixes_name_a_bucket() {
    for key in ["train.output", "audit.dir", "checkpoint.resume"] {
        let setting = format!("{key}=s3:///runs");
        let error = parse(MINIMAL, &[&setting]).unwrap_err().to_string();
        assert!(error.contains("must name a bucket"), "{error}");
        parse(MINIMAL, &[&format!("{key}=s3://bucket/runs")]).unwrap();
    }
    let error = parse(MINIMAL, &["checkpoint.resume=s3://bucket/"]).unwrap_err();
    assert!(
        error.to_string().contains("must name a checkpoint"),
        "{error}"
    );
}
