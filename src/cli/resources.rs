//! From the configuration to what several commands run on: data sources, devices, the stream's options and the monitor.

use std::path::PathBuf;
use std::pin::pin;
use std::time::{Duration, Instant};

use candle_core::Device;
use coffey_pipeline::format::latents::CAPTION;
use coffey_pipeline::order::{Lanes, Order};
use coffey_pipeline::{
    CacheOptions, Content, FlowMetrics, HubOptions, LookUp, MemberKeys, ShardList, ShardPattern,
    ShardUrl, SourceOptions, Sources, StreamConfig, counted,
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::config::{Config, DataKind, DeviceSpec, Lora, ModelRef};
use crate::device;
use crate::hub::Settings;
use crate::latents::{LatentSource, LatentSourceError};
use crate::memory::{self, Command, EncoderSizes, MemoryLimits, Sizes, TeacherSizes};
use crate::monitor::{Monitor, Server, StreamingCommand};
use crate::pretrained::{self, Components, Models};
use crate::ranks::Job;

/// Time between two looks at work that is waited for.
const TICK: Duration = Duration::from_millis(500);
/// Time after which a look-up is announced.
const ANNOUNCED: Duration = Duration::from_secs(2);

/// The data sources, with the runtime that does their network I/O.
pub(super) struct DataAccess {
    // Declared first so that it is dropped first: the embedded server and the clients live on the runtime.
    pub(super) sources: Sources,
    pub(super) runtime: Runtime,
    pub(super) metrics: FlowMetrics,
}

impl DataAccess {
    /// Starts the runtime and, if the configuration asks for it, the embedded S3 server.
    pub(super) fn open(options: impl Into<SourceOptions>) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .thread_name("network")
            .build()?;
        let sources = runtime.block_on(Sources::new(options))?;
        Ok(Self {
            sources,
            runtime,
            metrics: FlowMetrics::new(),
        })
    }

    /// The models of a configuration, fetched if they are not on this machine. Gives keys that were not written down the defaults for
    /// these models.
    pub(super) fn models(
        &self,
        config: &mut Config,
        teacher: &ModelRef,
        wanted: impl FnOnce(bool) -> Components,
    ) -> Result<Models, Failure> {
        let (sources, runtime) = (&self.sources, self.runtime.handle());
        let models = Models::fetch(&config.model, teacher, wanted, sources, runtime)?;
        if models.are_sdxl() {
            let adopted = config.adopt_sdxl_defaults();
            if !adopted.is_empty() {
                errln!("the teacher is SDXL: {}, by default", adopted.join(", "));
            }
        }
        Ok(models)
    }

    /// The folder of a model, fetched if it is not on this machine.
    pub(super) fn model(
        &self,
        model: &ModelRef,
        revision: &str,
        wanted: &Components,
    ) -> Result<PathBuf, Failure> {
        let (sources, runtime) = (&self.sources, self.runtime.handle());
        Ok(pretrained::fetch(model, revision, wanted, sources, runtime)?.folder)
    }

    /// The folder of an autoencoder, fetched if it is not on this machine.
    pub(super) fn vae(&self, model: &ModelRef) -> Result<PathBuf, Failure> {
        let (sources, runtime) = (&self.sources, self.runtime.handle());
        Ok(pretrained::fetch_vae(model, sources, runtime)?)
    }

    /// Does `work` that can be interrupted anywhere, as fetching can: a signal ends the process at once.
    pub(super) fn until_cancelled<T>(
        &self,
        cancel: &CancellationToken,
        work: impl FnOnce() -> T,
    ) -> T {
        let cancelled = cancel.clone().cancelled_owned();
        let exit = self.runtime.spawn(async {
            cancelled.await;
            errln!("{}", Failure::STOPPED);
            std::process::exit(i32::from(Failure::Stopped.code()));
        });
        let result = work();
        exit.abort();
        result
    }

    /// Waits for `work`, and meanwhile calls `tick` again and again.
    pub(super) fn wait<T>(&self, work: impl Future<Output = T>, mut tick: impl FnMut()) -> T {
        self.runtime.block_on(async {
            let mut work = pin!(work);
            let mut ticks = tokio::time::interval(TICK);
            loop {
                tokio::select! {
                    done = &mut work => return done,
                    _ = ticks.tick() => tick(),
                }
            }
        })
    }

    /// The shards that URLs stand for: lists read, braces expanded, prefixes and folders listed.
    pub(super) fn shards(&self, urls: &[ShardPattern]) -> Result<ShardList, Failure> {
        Ok(self.runtime.block_on(self.sources.shards(urls))?)
    }

    /// Looks up whether `shards` are there, unless the configuration says not to. Returns the end of a message: how long it
    /// took.
    pub(super) fn look_up<'a>(
        &self,
        config: &Config,
        shards: impl IntoIterator<Item = &'a ShardUrl>,
    ) -> Result<String, Failure> {
        if !config.data.check_shards {
            return Ok(String::new());
        }
        let shards: Vec<&ShardUrl> = shards.into_iter().collect();
        let (start, count, mut announced) = (Instant::now(), shards.len(), false);
        let announce = || {
            if !announced && start.elapsed() >= ANNOUNCED {
                announced = true;
                errln!(
                    "looking up {} (data.check_shards = false leaves this out)",
                    counted(count, "shard")
                );
            }
        };
        let LookUp { shards, unknown } = self.wait(self.sources.look_up(shards), announce)?;
        if unknown > 0 {
            errln!(
                "warning: whether {unknown} of {shards} shards are there is not known: their servers answer neither HEAD nor a request for one byte"
            );
        }
        Ok(match shards {
            0 => String::new(),
            shards => {
                let seconds = start.elapsed().as_secs_f64();
                format!("; {shards} looked up in {seconds:.2} s")
            }
        })
    }

    /// The manifests of `shards` if the configuration says that they hold latents. Replaces `[image]` by the settings the latents were
    /// made with.
    pub(super) fn latents(
        &self,
        config: &mut Config,
        shards: &[ShardUrl],
    ) -> Result<Option<LatentSource>, Failure> {
        let Some(text_from) = config.data.latents() else {
            return Ok(None);
        };
        let runtime = self.runtime.handle();
        let latents = LatentSource::open(shards, text_from, &self.sources, runtime)?;
        latents.settle(config)?;
        Ok(Some(latents))
    }
}

impl From<LatentSourceError> for Failure {
    fn from(error: LatentSourceError) -> Self {
        if error.is_config() {
            Self::Usage(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

/// The Hub as the environment says, for `hf://` shards.
pub(super) fn hub_options() -> HubOptions {
    match Settings::from_env() {
        Ok(settings) => HubOptions {
            endpoint: match settings.offline {
                true => Err("HF_HUB_OFFLINE is set, and this is on the Hub".to_owned()),
                false => Ok(settings.endpoint),
            },
            token: settings.token.map(|token| token.secret().to_owned()),
        },
        Err(error) => HubOptions {
            endpoint: Err(error.to_string()),
            token: None,
        },
    }
}

/// `[s3]`, the cache and the headers of `[data]`, and the Hub.
pub(super) fn source_options(config: &Config) -> SourceOptions {
    let data = &config.data;
    // The configuration was checked when it was read.
    let headers = data
        .http_headers
        .iter()
        .filter_map(|text| text.parse().ok());
    SourceOptions {
        s3: config.s3.clone(),
        http_headers: headers.collect(),
        hub: hub_options(),
        members: MemberKeys {
            images: data.image_keys.clone(),
            captions: data.caption_keys.clone(),
        },
        cache: data.cache_dir.as_ref().map(|folder| CacheOptions {
            folder: folder.clone(),
            limit_bytes: data.cache_limit_gb.saturating_mul(1_000_000_000),
        }),
    }
}

/// Content of the shards, by their manifests if they hold latents.
pub(super) fn content(latents: Option<&LatentSource>) -> Content {
    latents.map_or(Content::Images, LatentSource::content)
}

/// The stream of listed shards of images in one lane, by `[data]`, `[data.filter]` and `[image]`. For latents, the caller sets
/// `content` and `listed`.
pub(super) fn stream_config(
    config: &Config,
    shards: Vec<ShardUrl>,
    order: Order,
    batch_size: usize,
) -> StreamConfig {
    let data = &config.data;
    StreamConfig {
        shards,
        content: Content::Images,
        listed: None,
        image_keys: data.image_keys.clone(),
        caption_keys: match data.kind {
            DataKind::Images => data.caption_keys.clone(),
            DataKind::Latents => vec![CAPTION.to_owned()],
        },
        max_samples: data.max_samples,
        resample: data.resample_shards,
        shuffle_buffer: data.shuffle_buffer,
        shuffle_buffer_mb: data.shuffle_buffer_mb,
        open_shards: data.open_shards,
        decode_threads: data.decode_threads,
        prefetch_batches: data.prefetch_batches,
        max_bad_fraction: data.max_bad_fraction,
        filter: data.filter.clone().unwrap_or_default(),
        image: config.image,
        order,
        skip_duplicate_keys: false,
        batch_size,
        seed: config.train.seed,
        lanes: Lanes::default(),
        resume: None,
    }
}

/// The device of `train.device`.
pub(super) fn train_device(config: &Config) -> Result<Device, Failure> {
    open_device(config, "train.device", config.train.device)
}

/// The device of one entry of `encode.devices`.
pub(super) fn encode_device(config: &Config, index: usize) -> Result<Device, Failure> {
    let key = format!("encode.devices[{index}]");
    open_device(config, &key, config.encode.devices[index])
}

/// The devices of `encode.devices`, an entry each.
pub(super) fn encode_devices(config: &Config) -> Result<Vec<Device>, Failure> {
    let entries = 0..config.encode.devices.len();
    entries.map(|index| encode_device(config, index)).collect()
}

/// Sizes for the estimate of a command's memory. `models`: the models it loads; `lora`: the LoRA it
/// trains.
pub(super) fn memory_sizes(
    command: Command,
    content: Content,
    models: Option<&Models>,
    lora: Option<&Lora>,
) -> Result<Sizes, Failure> {
    let encoders = models.map(|models| EncoderSizes::read(&models.pipeline, models.vae.as_deref()));
    let teacher = match (command, models) {
        (Command::Train, Some(models)) => Some(TeacherSizes::read(&models.pipeline, lora)?),
        _ => None,
    };
    Ok(Sizes {
        command,
        ranks: 1,
        sample_bytes: None,
        content,
        encoders: encoders.transpose()?,
        teacher,
    })
}

/// Refuses a command that needs more memory than there is, and warns if it needs more than is free. `models`: the models it loads.
/// `job`: the ranks that run together.
pub(super) fn check_memory(
    command: Command,
    config: &Config,
    content: Content,
    models: Option<&Models>,
    train_device: Option<&Device>,
    job: &Job,
) -> Result<(), Failure> {
    let sizes = Sizes {
        ranks: job.collective.rank().world,
        ..memory_sizes(command, content, models, config.lora.as_ref())?
    };
    let card = train_device.and_then(device::memory);
    let cards = card.map(|memory| (config.train.device.to_string(), memory));
    let limits = MemoryLimits::now(cards.into_iter().collect()).shared_by(job.local_world);
    if let Some(warning) = memory::check(config, &sizes, &limits)? {
        errln!("warning: {warning}");
    }
    Ok(())
}

fn open_device(config: &Config, key: &str, spec: DeviceSpec) -> Result<Device, Failure> {
    device::open(spec).map_err(|error| {
        if error.is_config() {
            config.refuse_device(key, spec, error).into()
        } else {
            Failure::Failed(format!("{key}: {spec} can't be opened: {error}").into())
        }
    })
}

/// The monitor of a command, and its HTTP server if `[metrics]` asks for one. The server answers until it is dropped.
pub(super) fn start_monitor(
    config: &Config,
    data: &DataAccess,
    command: StreamingCommand,
) -> Result<(Monitor, Option<Server>), Failure> {
    let output = match command {
        StreamingCommand::Train => config.train.output.as_ref(),
        StreamingCommand::Precompute => config.latents.as_ref().map(|latents| &latents.output),
        StreamingCommand::Bench => None,
    };
    let subject = match output {
        Some(output) => output.display().to_string(),
        None => "the data pipeline alone".to_owned(),
    };
    let timeout = Duration::from_secs(config.train.stall_timeout);
    let monitor = Monitor::new(
        data.metrics.clone(),
        data.sources.s3_server().clone(),
        command,
        subject,
        timeout,
    );
    let Some(listen) = config.metrics.listen else {
        return Ok((monitor, None));
    };
    let server = Server::start(listen.0, monitor.clone(), data.runtime.handle())
        .map_err(|error| config.refuse_listen(listen, &error))?;
    errln!("this run in a browser: http://{}/", server.address());
    errln!("metrics at http://{}/metrics", server.address());
    Ok((monitor, Some(server)))
}
