//! `coffey check`: a dry run. Tries once everything that `train` or `precompute` needs.

mod cost;
mod dry_run;
mod ranks;
mod report;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use clap::Args;
use coffey_pipeline::flow::FlowMetrics;
use coffey_pipeline::order::Order;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::text::escaped;
use coffey_pipeline::{Batch, Content, ShardUrl, Stream, StreamConfig};

use super::output::check_writable;
use super::resources::{
    DataAccess, content, encode_devices, memory_sizes, source_options, stream_config, train_device,
};
use super::{ConfigArgs, Failure, job};
use crate::config::{Config, ConfigError, DeviceSpec, ModelRef, PrecomputeRequired, TrainRequired};
use crate::device;
use crate::diffusion::{NoiseSchedule, Prediction};
use crate::encode::{EncoderOptions, Encoders};
use crate::hub::Push;
use crate::latents::{LatentSource, TextShapes};
use crate::memory::{self, Command, EncoderSizes, MemoryLimits, MemoryPlan, Sizes, TeacherSizes};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{PipelineParts, UNet, Weights, check_fit};
use crate::pretrained::{Components, Models as ModelFolders};
use crate::ranks::Job;
use crate::train::{
    RunDir, compute_dtype, describe_encoders, describe_training, encoder_options, lcm_schedule,
};
use cost::{Cost, SampleSizes};
use dry_run::DryRun;
use ranks::{RanksCheck, exchange_speed};
use report::CheckReport;
use tokio_util::sync::CancellationToken;

/// Samples whose mean size is measured, the first of the data.
const PROBED_SAMPLES: usize = 16;

/// Options of `coffey check`.
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print one JSON object to standard output.
    #[arg(long)]
    json: bool,
    /// Print the configuration with every default filled in, as TOML, and check nothing else.
    #[arg(long, conflicts_with = "json")]
    print_config: bool,
}

/// The command that is checked: `train`, unless the configuration only says where latents go.
#[derive(Debug)]
enum Purpose {
    Train(TrainRequired),
    Precompute(PrecomputeRequired),
}

impl Purpose {
    fn of(config: &Config) -> Result<Self, ConfigError> {
        if config.train.output.is_none() && config.latents.is_some() {
            config.require_precompute().map(Self::Precompute)
        } else {
            config.require_train().map(Self::Train)
        }
    }

    fn command(&self) -> &'static str {
        match self {
            Self::Train(_) => "train",
            Self::Precompute(_) => "precompute",
        }
    }

    fn teacher(&self) -> &ModelRef {
        match self {
            Self::Train(required) => &required.teacher,
            Self::Precompute(required) => &required.teacher,
        }
    }

    /// The folder to be written, and the key that names it.
    fn output(&self) -> (&'static str, &Path) {
        match self {
            Self::Train(required) => ("train.output", &required.output),
            Self::Precompute(required) => ("latents.output", &required.latents.output),
        }
    }
}

/// Runs `coffey check`.
pub(super) fn run(args: CheckArgs) -> Result<(), Failure> {
    if args.print_config {
        let toml = args.config.load()?.to_toml();
        out!("{}", toml.map_err(|error| Failure::Usage(error.into()))?);
        return Ok(());
    }
    let (mut report, mut job) = (CheckReport::new(args.json), Job::solo());
    let mut result = check(&args.config, &mut report, &mut job);
    if args.json && job.collective.rank().leads() {
        let value = serde_json::to_value(&report).map_err(std::io::Error::from);
        match value {
            Ok(value) => outln!("{value:#}"),
            Err(error) => result = Err(error.into()),
        }
    }
    job::end(&job, result)
}

/// The configuration and its purpose; `job` is then the job that this process belongs to.
fn load(args: &ConfigArgs, job: &mut Job) -> Result<(Config, Purpose), Failure> {
    let mut config = args.load()?;
    let purpose = Purpose::of(&config)?;
    // The ranks of `coffey precompute` know nothing of each other.
    if let Purpose::Train(_) = purpose {
        *job = job::join(&config)?;
        job::share_machine(&mut config, job)?;
    }
    Ok((config, purpose))
}

fn check(args: &ConfigArgs, report: &mut CheckReport, job: &mut Job) -> Result<(), Failure> {
    let loaded = load(args, job);
    let collective = &*job.collective;
    if let (Ok(_), false) = (&loaded, collective.rank().leads()) {
        // Rank 0 checks for all.
        return exchange_speed(collective, job.limit).map(drop);
    }
    let (mut config, purpose, data) = report.step("configuration", || {
        let (config, purpose) = loaded?;
        let data = DataAccess::open(source_options(&config))?;
        let message = format!(
            "{} is valid, for `coffey {}`",
            args.config.display(),
            purpose.command()
        );
        Ok(((config, purpose, data), message))
    })?;
    if let (Purpose::Train(_), Some(push)) = (&purpose, Push::prepare(&config.hub).transpose()) {
        report.step("hub", || {
            let target = push?.check(&CancellationToken::new())?;
            Ok(((), format!("`coffey train` {target}")))
        })?;
    }
    let cards = match &purpose {
        Purpose::Train(_) if config.train.device != DeviceSpec::Cpu => {
            report.step("device", || check_train_device(&config))?
        }
        _ => BTreeMap::new(),
    };
    report.step("output", || {
        let (key, place) = purpose.output();
        check_writable(key, place, &data)?;
        if let Purpose::Train(_) = purpose {
            let open = |place: &str| data.sources.destination(place, data.runtime.handle());
            RunDir::check_free(place, open)?;
        }
        Ok(((), format!("{} can be written", place.display())))
    })?;
    let models = report.step("models", || {
        let wanted = match &purpose {
            Purpose::Train(_) => Components::training,
            Purpose::Precompute(_) => Components::encoding,
        };
        let models = data.models(&mut config, purpose.teacher(), wanted)?;
        let folders = [Some(&models.pipeline), models.vae.as_ref()]
            .into_iter()
            .flatten();
        let folders: Vec<_> = folders.map(|folder| folder.display().to_string()).collect();
        Ok((models, folders.join(", VAE ")))
    })?;
    let shards = report.step("sources", || {
        let list = data.shards(&config.data.shards)?;
        let looked_up = data.look_up(&config, list.unlisted())?;
        let shards = list.shards;
        let first = shards[0].to_string();
        let message = format!("shards: {}{looked_up}; the first is {first}", shards.len());
        Ok((shards, message))
    })?;
    let latents = match config.data.latents() {
        None => None,
        Some(_) => report.step("latents", || {
            let latents = data.latents(&mut config, &shards)?;
            if let Some(latents) = &latents {
                latents.check(&models)?;
            }
            let message = "the manifests list all shards; made with the configured models";
            Ok((latents, message.to_owned()))
        })?,
    };
    let content = content(latents.as_ref());
    let command = match purpose {
        Purpose::Train(_) => Command::Train,
        Purpose::Precompute(_) => Command::Precompute,
    };
    let ranks = collective.rank().world;
    let limits = MemoryLimits::now(cards).shared_by(job.local_world);
    // Before a sample is decoded. Faults of the models are those of the steps that load them.
    let sizes = memory_sizes(command, content, Some(&models), config.lora.as_ref());
    if let Ok(sizes) = sizes.map(|sizes| Sizes { ranks, ..sizes })
        && let Err(error) = memory::check(&config, &sizes, &limits)
    {
        return report.step("memory", || Err(error.into()));
    }
    let (batch, sample_bytes) = report.step("first sample", || {
        let FirstSample {
            batch,
            mean_bytes: sample_bytes,
            skipped,
        } = first_sample(&config, &purpose, latents.as_ref(), &data, &shards)?;
        let sample = &batch.samples[0];
        let (width, height) = sample.geometry.original;
        let what = match content {
            Content::Images => String::new(),
            Content::Latents(shapes) => format!("latents {:?} of ", shapes.moments),
        };
        let message = format!(
            "{} of {}: {what}{width}x{height} pixels, {:?}{skipped}",
            escaped(&sample.key),
            shards[sample.shard],
            sample.caption
        );
        Ok(((batch, sample_bytes), message))
    })?;
    let encoders = report.step("encoders", || load_encoders(&config, &models))?;
    let teacher = match &purpose {
        Purpose::Train(_) => Some(report.step("teacher", || {
            load_teacher(&config, &models.pipeline, &encoders.models)
        })?),
        Purpose::Precompute(_) => None,
    };
    if let Purpose::Precompute(PrecomputeRequired { latents, .. }) = &purpose {
        let vae = encoders.models.vae().config();
        let side = config.image.resolution as usize / vae.downscale();
        let (_, tokens, width) = encoders.models.encode_text(&[""])?.hidden.dims3()?;
        let sizes = SampleSizes {
            sample: &batch.samples[0],
            bytes: sample_bytes,
            latent: [2 * vae.latent_channels, side, side],
            text: TextShapes {
                prompt_embeds: [tokens, width],
                pooled: encoders.models.text().pooled_width().map(|width| [width]),
            },
        };
        let cost = report.step("cost", || {
            let cost = Cost::estimate(&config, latents, &sizes, &shards, &data)?;
            let message = cost.message();
            Ok((cost, message))
        })?;
        report.cost(cost);
    }
    let sizes = Sizes {
        command,
        ranks,
        sample_bytes: Some(sample_bytes),
        content,
        encoders: Some(encoders.sizes),
        teacher: teacher.as_ref().map(|teacher| teacher.sizes.clone()),
    };
    report.memory(MemoryPlan::new(&config, &sizes, limits))?;
    if ranks > 1 {
        let ranks = report.step("ranks", || {
            let ranks = RanksCheck::new(&config, job, shards.len(), &sizes)?;
            let message = ranks.message();
            Ok((ranks, message))
        })?;
        report.ranks(ranks);
    }
    report.step("dry run", || {
        let start = Instant::now();
        let dry_run = DryRun {
            config: &config,
            folders: &models,
            encoders: &encoders.models,
            teacher: teacher.as_ref(),
            device: &train_device(&config)?,
        };
        let done = dry_run.run(&batch)?;
        Ok((
            (),
            format!("{done} in {:.2} s", start.elapsed().as_secs_f64()),
        ))
    })
}

/// The memory of the device that trains, by its name.
fn check_train_device(config: &Config) -> Result<(BTreeMap<String, u64>, String), Failure> {
    let (name, device) = (config.train.device.to_string(), train_device(config)?);
    let memory = device::memory(&device).unwrap_or_default();
    let message = format!("{name} with {:.1} GB", memory as f64 / 1e9);
    Ok(([(name, memory)].into(), message))
}

/// The findings of the first samples of a run.
struct FirstSample {
    /// The first one that the run uses.
    batch: Batch,
    /// Mean size of a sample in its shard. Bytes.
    mean_bytes: u64,
    /// The samples that were skipped, by reason, for the end of a message.
    skipped: String,
}

/// The first sample that a run uses, and the mean size of the first samples. Reads shards in the order of the run, without its shuffle
/// buffer, until there are enough samples.
fn first_sample(
    config: &Config,
    purpose: &Purpose,
    latents: Option<&LatentSource>,
    data: &DataAccess,
    shards: &[ShardUrl],
) -> Result<FirstSample, Failure> {
    let metrics = FlowMetrics::private();
    let order = match purpose {
        Purpose::Train(_) => Order::Shuffled,
        Purpose::Precompute(_) => Order::Sequential,
    };
    let probe = StreamConfig {
        content: content(latents),
        listed: latents.map(LatentSource::listed),
        prefetch_batches: 1,
        decode_threads: 1,
        shuffle_buffer: 0,
        ..stream_config(config, shards.to_vec(), order, 1)
    };
    let stream = Stream::open(probe, &data.sources, &metrics, data.runtime.handle())?;
    let consumer = metrics.stage(Stage::Train);
    let mut first = None;
    let mut reasons = BTreeMap::<String, usize>::new();
    for _ in 0..PROBED_SAMPLES {
        let Some(batch) = stream.batches().recv_blocking(&consumer) else {
            break;
        };
        let batch = batch?;
        for skipped in &batch.skipped {
            *reasons.entry(skipped.reason.clone()).or_default() += 1;
        }
        first.get_or_insert(batch);
    }
    let snapshot = metrics.snapshot();
    let untar = snapshot.stage(Stage::Untar);
    // A stream that yields nothing ends in an error.
    let batch = first.ok_or_else(|| Failure::Failed("the stream ended without a sample".into()))?;
    let reasons: Vec<_> = reasons
        .iter()
        .map(|(why, n)| format!("{why} {n}"))
        .collect();
    let skipped = match reasons.as_slice() {
        [] => String::new(),
        reasons => format!("; skipped among the first samples: {}", reasons.join(", ")),
    };
    Ok(FirstSample {
        batch,
        mean_bytes: untar.bytes / untar.items.max(1),
        skipped,
    })
}

struct LoadedEncoders {
    models: Encoders,
    sizes: EncoderSizes,
}

fn load_encoders(
    config: &Config,
    folders: &ModelFolders,
) -> Result<(LoadedEncoders, String), Failure> {
    let devices = encode_devices(config)?;
    let (pipeline, vae) = (&folders.pipeline, folders.vae.as_deref());
    let options = EncoderOptions {
        vae_batch: 1,
        ..encoder_options(config)
    };
    let models = Encoders::load(pipeline, vae, &devices[0], options)?;
    let loaded = LoadedEncoders {
        sizes: EncoderSizes::read(pipeline, vae)?,
        models,
    };
    let latents = loaded.models.vae().config();
    let text = loaded.models.text();
    let (encoders, pooled) = match text.pooled_width() {
        None => ("text encoder", String::new()),
        Some(pooled) => ("text encoders", format!(", pooled {pooled}")),
    };
    let mut message = format!(
        "{encoders} {}, width {}{pooled}; VAE {}, {} latent channels, {}x down; tokenizer, {} tokens",
        millions(loaded.sizes.text),
        text.width(),
        millions(loaded.sizes.vae),
        latents.latent_channels,
        latents.downscale(),
        text.tokens()
    );
    if let Some(how) = describe_encoders(&loaded.models) {
        message = format!("{message}; on {}: {how}", config.encode.devices[0]);
    }
    Ok((loaded, message))
}

struct LoadedTeacher {
    unet: UNet,
    schedule: NoiseSchedule,
    sizes: TeacherSizes,
}

fn load_teacher(
    config: &Config,
    pipeline: &Path,
    encoders: &Encoders,
) -> Result<(LoadedTeacher, String), Failure> {
    let schedule = lcm_schedule(config, pipeline)?;
    let folder = pipeline.join("unet");
    let sizes = TeacherSizes::read(pipeline, config.lora.as_ref())?;
    let unet_config = &sizes.unet;
    check_fit(&PipelineParts {
        folder: pipeline,
        unet: unet_config,
        vae: encoders.vae().config(),
        text_width: encoders.text().width(),
        pooled_width: encoders.text().pooled_width(),
        resolution: config.image.resolution as usize,
    })?;
    let device = train_device(config)?;
    let train = &config.train;
    let weights = Weights::load(&folder, WEIGHTS_STEM, train.teacher_dtype.into(), &device)?;
    let unet = UNet::new(weights.builder(), unet_config, train.attention)?;
    weights.expect_all_taken(&[])?;
    let unet = unet.computing_in(compute_dtype(config));
    let mut message = format!(
        "UNet {}, text width {}, latents {}x{}; {} timesteps, predicts {}",
        millions(sizes.parameters),
        unet_config.cross_attention_dim,
        unet_config.sample_size[0],
        unet_config.sample_size[1],
        schedule.len(),
        match schedule.prediction() {
            Prediction::Epsilon => "the noise",
            Prediction::Sample => "the clean latents",
            Prediction::VPrediction => "the velocity",
        }
    );
    if let (Some(lora), Some(adapters)) = (&config.lora, sizes.adapters) {
        message = format!(
            "{message}; a LoRA of rank {} has {}",
            lora.rank,
            millions(adapters)
        );
    }
    if let Some(how) = describe_training(config, &device, unet_config) {
        message = format!("{message}; a step on {}: {how}", config.train.device);
    }
    let teacher = LoadedTeacher {
        unet,
        schedule,
        sizes,
    };
    Ok((teacher, message))
}

fn millions(parameters: u64) -> String {
    format!("{:.1} M parameters", parameters as f64 / 1e6)
}
