//! From the configuration to a running stream: what `train`, `precompute`, `check` and `bench` share.

use coffey_pipeline::order::Order;
use coffey_pipeline::shard::expand;
use coffey_pipeline::{
    CropMode, FlowMetrics, ImageOptions, Interpolation, S3Options, ShardUrl, Sources, StreamConfig,
};
use tokio::runtime::Runtime;

use super::Failure;
use crate::config::{self, Config};

/// The places data comes from, with the runtime their waiting happens on.
pub(super) struct DataAccess {
    // Declared first so that it goes first: the embedded server and the clients live on the runtime.
    pub(super) sources: Sources,
    pub(super) runtime: Runtime,
    pub(super) metrics: FlowMetrics,
}

impl DataAccess {
    /// Starts the runtime and, if the configuration asks for it, the embedded S3 server.
    pub(super) fn open(options: S3Options) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .thread_name("network")
            .build()?;
        let metrics = FlowMetrics::new();
        let sources = runtime.block_on(Sources::new(options, metrics.clone()))?;
        Ok(Self {
            sources,
            runtime,
            metrics,
        })
    }

    /// The shards that URLs stand for: braces expanded, prefixes and folders listed.
    pub(super) fn shards(&self, urls: &[String]) -> Result<Vec<ShardUrl>, Failure> {
        let urls = expand(urls)?;
        Ok(self.runtime.block_on(self.sources.list(&urls))?)
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
        max_attempts: s3.max_attempts,
        embedded_root: s3.embedded_root.clone(),
        ..S3Options::default()
    }
}

/// The `[data]`, `[data.filter]` and `[image]` tables for shards that were listed.
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
        image_keys: data.image_keys.clone(),
        caption_keys: data.caption_keys.clone(),
        max_samples: data.max_samples,
        resample: data.resample_shards,
        shuffle_buffer: data.shuffle_buffer,
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
                config::Interpolation::Nearest => Interpolation::Nearest,
            },
            crop: match image.crop {
                config::Crop::Random => CropMode::Random,
                config::Crop::Center => CropMode::Center,
            },
            flip: image.flip,
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
