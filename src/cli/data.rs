//! From the configuration to a running stream: what `train`, `precompute`, `check` and `bench` share.

use std::path::PathBuf;

use coffey_pipeline::order::Order;
use coffey_pipeline::{
    CacheOptions, Content, CropMode, FlowMetrics, ImageOptions, Interpolation, S3Options, ShardUrl,
    SourceOptions, Sources, StreamConfig,
};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::Failure;
use crate::config::{self, Config, DataKind, ModelRef};
use crate::latents::{self, LatentSource, LatentSourceError};
use crate::pretrained::{self, Models, Wanted};

/// The places data comes from, with the runtime their waiting happens on.
pub(super) struct DataAccess {
    // Declared first so that it goes first: the embedded server and the clients live on the runtime.
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

    /// The models of a configuration, fetched if they are not on this machine.
    pub(super) fn models(
        &self,
        config: &Config,
        teacher: &ModelRef,
        wanted: impl FnOnce(bool) -> Wanted,
    ) -> Result<Models, Failure> {
        let (sources, runtime) = (&self.sources, self.runtime.handle());
        Ok(Models::fetch(
            &config.model,
            teacher,
            wanted,
            sources,
            runtime,
        )?)
    }

    /// The folder of a model.
    pub(super) fn model(
        &self,
        model: &ModelRef,
        revision: &str,
        wanted: &Wanted,
    ) -> Result<PathBuf, Failure> {
        let (sources, runtime) = (&self.sources, self.runtime.handle());
        Ok(pretrained::fetch(model, revision, wanted, sources, runtime)?.folder)
    }

    /// The folder of an autoencoder.
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

    /// The shards that URLs stand for: lists read, braces expanded, prefixes and folders listed.
    pub(super) fn shards(&self, urls: &[String]) -> Result<Vec<ShardUrl>, Failure> {
        Ok(self.runtime.block_on(self.sources.shards(urls))?)
    }

    /// What there is to know of the shards of a configuration if they hold latents; `[image]` then says what those were made with.
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
        match error.is_config() {
            true => Self::Usage(error.into()),
            false => Self::Failed(error.into()),
        }
    }
}

/// The `[s3]` table, and of `[data]` the cache.
pub(super) fn source_options(config: &Config) -> SourceOptions {
    let data = &config.data;
    SourceOptions {
        s3: s3_options(&config.s3),
        cache: data.cache_dir.as_ref().map(|folder| CacheOptions {
            folder: folder.clone(),
            limit_bytes: data.cache_limit_gb.saturating_mul(1_000_000_000),
        }),
    }
}

/// The `[s3]` table.
pub(super) fn s3_options(s3: &config::S3) -> S3Options {
    S3Options {
        endpoint_url: s3.endpoint_url.clone(),
        region: s3.region.clone(),
        path_style: s3.path_style,
        anonymous: s3.anonymous,
        requester_pays: s3.requester_pays,
        ca_bundle: s3.ca_bundle.clone(),
        max_attempts: s3.max_attempts,
        embedded_root: s3.embedded_root.clone(),
        ..S3Options::default()
    }
}

/// What the stream is to read.
pub(super) fn content(latents: Option<&LatentSource>) -> Content {
    latents.map_or(Content::Images, LatentSource::content)
}

/// The `[data]`, `[data.filter]` and `[image]` tables for shards of images that were listed. For latents, only the content is
/// another.
pub(super) fn stream_config(
    config: &Config,
    shards: Vec<ShardUrl>,
    order: Order,
    batch_size: usize,
) -> StreamConfig {
    let Config { data, image, .. } = config;
    let filter = data.filter.clone().unwrap_or_default();
    StreamConfig {
        shards,
        content: Content::Images,
        image_keys: data.image_keys.clone(),
        caption_keys: match data.kind {
            DataKind::Images => data.caption_keys.clone(),
            DataKind::Latents => vec![latents::CAPTION_KEY.to_owned()],
        },
        max_samples: data.max_samples,
        resample: data.resample_shards,
        shuffle_buffer: data.shuffle_buffer,
        shuffle_buffer_mb: data.shuffle_buffer_mb,
        open_shards: data.open_shards,
        decode_threads: data.decode_threads,
        prefetch_batches: data.prefetch_batches,
        max_bad_fraction: data.max_bad_fraction,
        filter: coffey_pipeline::Filter {
            min_size: filter.min_size,
            max_pwatermark: filter.max_pwatermark,
            max_punsafe: filter.max_punsafe,
            min_similarity: filter.min_similarity,
            min_aesthetic: filter.min_aesthetic,
            min_caption_chars: filter.min_caption_chars,
            max_caption_chars: filter.max_caption_chars,
        },
        image: ImageOptions {
            resolution: image.resolution as u32,
            interpolation: match image.interpolation {
                config::Interpolation::Bilinear => Interpolation::Bilinear,
                config::Interpolation::Bicubic => Interpolation::Bicubic,
                config::Interpolation::Lanczos => Interpolation::Lanczos,
                config::Interpolation::Box => Interpolation::Box,
                config::Interpolation::Hamming => Interpolation::Hamming,
                config::Interpolation::Nearest => Interpolation::Nearest,
            },
            crop: match image.crop {
                config::Crop::Random => CropMode::Random,
                config::Crop::Center => CropMode::Center,
            },
            flip: image.flip,
            scaled_decode: image.scaled_decode,
            ..ImageOptions::default()
        },
        order,
        batch_size,
        seed: config.train.seed,
        rank: 0,
        world: 1,
        resume: None,
    }
}
