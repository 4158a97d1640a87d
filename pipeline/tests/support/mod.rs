//! Shards made on the spot and servers to read them from.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that fails is a test that fails"
)]
#![allow(
    unreachable_pub,
    reason = "a module of every test file, a library to none"
)]

pub mod faulty;

use std::io::Cursor;
use std::path::Path;

use coffey_pipeline::flow::{FlowMetrics, Stage};
use coffey_pipeline::{
    ImageOptions, PixelBatch, S3Options, ShardUrl, Sources, Stream, StreamConfig, StreamError,
    expand,
};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use tokio::runtime::Runtime;

/// An image whose pixels tell it from others.
pub fn picture(seed: u32, width: u32, height: u32) -> Vec<u8> {
    let image = RgbImage::from_fn(width, height, |x, y| {
        Rgb([
            (x * 7 + seed) as u8,
            (y * 5 + seed * 3) as u8,
            (x * y + seed * 11) as u8,
        ])
    });
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::from(image)
        .write_to(&mut bytes, ImageFormat::Png)
        .unwrap();
    bytes.into_inner()
}

/// A tar of members.
pub fn tar_of(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder
            .append_data(&mut header, path, content.as_slice())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

/// The members of sample `n` of shard `shard`.
pub fn sample(shard: u32, n: u32) -> Vec<(String, Vec<u8>)> {
    let key = format!("{shard:05}{n:04}");
    let seed = shard * 100 + n;
    let json = format!(
        r#"{{"original_width": {}, "original_height": 600, "pwatermark": 0.0}}"#,
        500 + n
    );
    vec![
        (format!("{key}.png"), picture(seed, 20 + n % 5, 24)),
        (format!("{key}.txt"), format!("picture {seed}").into_bytes()),
        (format!("{key}.json"), json.into_bytes()),
    ]
}

/// A shard of `samples` samples.
pub fn shard(shard: u32, samples: u32) -> Vec<u8> {
    let members: Vec<_> = (0..samples).flat_map(|n| sample(shard, n)).collect();
    tar_of(&members)
}

/// A runtime, sources and metrics: what a test's streams share.
pub struct Bench {
    pub runtime: Runtime,
    pub sources: Sources,
    pub metrics: FlowMetrics,
}

impl Bench {
    pub fn new(options: S3Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let metrics = FlowMetrics::new();
        let sources = runtime
            .block_on(Sources::new(options, metrics.clone()))
            .unwrap();
        Self {
            runtime,
            sources,
            metrics,
        }
    }

    /// The S3 server inside the process, serving `root`.
    pub fn embedded(root: &Path) -> Self {
        Self::new(S3Options {
            embedded_root: Some(root.to_owned()),
            ..S3Options::default()
        })
    }

    /// Another S3 server.
    pub fn s3_at(endpoint: &str, max_attempts: u32) -> Self {
        Self::new(S3Options {
            endpoint_url: Some(endpoint.to_owned()),
            anonymous: true,
            path_style: true,
            max_attempts,
            stall_timeout: std::time::Duration::from_millis(300),
            ..S3Options::default()
        })
    }

    pub fn open(&self, config: StreamConfig) -> Result<Stream, StreamError> {
        Stream::open(config, &self.sources, &self.metrics, self.runtime.handle())
    }

    /// The next `n` batches, or the error in their place.
    pub fn batches(&self, config: StreamConfig, n: usize) -> Result<Vec<PixelBatch>, StreamError> {
        take(&self.open(config)?, &self.metrics, n)
    }

    /// Everything a stream that ends gives.
    pub fn all(&self, config: StreamConfig) -> Result<Vec<PixelBatch>, StreamError> {
        self.batches(config, usize::MAX)
    }

    /// The error a stream ends with.
    pub fn error(&self, config: StreamConfig) -> StreamError {
        match self.batches(config, 10_000) {
            Ok(batches) => panic!("{} batches and no error", batches.len()),
            Err(error) => error,
        }
    }
}

pub fn take(
    stream: &Stream,
    metrics: &FlowMetrics,
    n: usize,
) -> Result<Vec<PixelBatch>, StreamError> {
    let consumer = metrics.stage(Stage::Train);
    let mut batches = Vec::new();
    while batches.len() < n {
        match stream.batches().recv_blocking(&consumer) {
            Some(batch) => batches.push(batch?),
            None => break,
        }
    }
    Ok(batches)
}

/// A bucket `data` of `shards` shards `00000.tar` … under `root`.
pub fn bucket(root: &Path, shards: u32, samples: impl Fn(u32) -> u32) -> Vec<ShardUrl> {
    std::fs::create_dir_all(root.join("data")).unwrap();
    for n in 0..shards {
        std::fs::write(root.join(format!("data/{n:05}.tar")), shard(n, samples(n))).unwrap();
    }
    urls(&format!("s3://data/{{00000..{:05}}}.tar", shards - 1))
}

pub fn urls(pattern: &str) -> Vec<ShardUrl> {
    expand(&[pattern.to_owned()]).unwrap()
}

/// A configuration for small pictures.
pub fn config(shards: Vec<ShardUrl>) -> StreamConfig {
    StreamConfig {
        shards,
        resample: false,
        shuffle_buffer: 7,
        open_shards: 3,
        decode_threads: 2,
        prefetch_batches: 2,
        batch_size: 4,
        seed: 453_645_634,
        image: ImageOptions {
            resolution: 16,
            flip: true,
            ..ImageOptions::default()
        },
        ..StreamConfig::default()
    }
}

pub fn keys(batches: &[PixelBatch]) -> Vec<String> {
    batches
        .iter()
        .flat_map(|batch| batch.samples.iter().map(|sample| sample.key.to_string()))
        .collect()
}
