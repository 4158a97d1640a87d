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

pub mod proxy;
pub mod server;

use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use coffey_pipeline::flow::FlowMetrics;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{
    Batch, BatchContent, ImageOptions, Order, S3Options, ShardUrl, SourceError, Sources, Stream,
    StreamConfig, StreamError, expand,
};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use tokio::runtime::Runtime;

use proxy::{Proxy, Rule};

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

/// A bucket `data` on an S3 server behind a proxy that makes faults.
pub struct Faulty {
    pub proxy: Proxy,
    pub root: tempfile::TempDir,
    _runtime: Runtime,
}

impl Faulty {
    /// Open to everybody; `rule` says which requests go wrong.
    pub fn start(rule: Rule) -> Self {
        Self::with_keys(&[], rule)
    }

    /// For requests signed with one of `keys`.
    pub fn with_keys(keys: &[&str], rule: Rule) -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("data")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let upstream = server::serve(runtime.handle(), root.path(), keys);
        Self {
            proxy: Proxy::start(runtime.handle(), upstream, rule),
            root,
            _runtime: runtime,
        }
    }

    pub fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.root.path().join("data").join(name), content).unwrap();
    }

    /// `name` as an object in S3, and as a file of a web server.
    pub fn both(&self, name: &str) -> [String; 2] {
        [
            format!("s3://data/{name}"),
            format!("{}/data/{name}", self.proxy.endpoint),
        ]
    }

    pub fn bench(&self, max_attempts: u32) -> Bench {
        Bench::s3_at(&self.proxy.endpoint, max_attempts)
    }
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
        let sources = runtime.block_on(Sources::new(options)).unwrap();
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
            stall_timeout: Duration::from_millis(300),
            ..S3Options::default()
        })
    }

    /// The whole object, read without a stream.
    pub fn read(&self, url: &str) -> Result<Vec<u8>, SourceError> {
        self.runtime.block_on(read_object(&self.sources, url))
    }

    pub fn open(&self, config: StreamConfig) -> Result<Stream, StreamError> {
        Stream::open(config, &self.sources, &self.metrics, self.runtime.handle())
    }

    /// The next `n` batches, or the error in their place.
    pub fn batches(&self, config: StreamConfig, n: usize) -> Result<Vec<Batch>, StreamError> {
        take(&self.open(config)?, &self.metrics, n)
    }

    /// Everything a stream that ends gives.
    pub fn all(&self, config: StreamConfig) -> Result<Vec<Batch>, StreamError> {
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

pub async fn read_object(sources: &Sources, url: &str) -> Result<Vec<u8>, SourceError> {
    let mut reader = sources.open(&url.parse().unwrap()).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

pub fn take(stream: &Stream, metrics: &FlowMetrics, n: usize) -> Result<Vec<Batch>, StreamError> {
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

/// The same, every shard once and in order.
pub fn sequential(shards: Vec<ShardUrl>) -> StreamConfig {
    StreamConfig {
        order: Order::Sequential,
        ..config(shards)
    }
}

pub fn keys(batches: &[Batch]) -> Vec<String> {
    batches
        .iter()
        .flat_map(|batch| batch.samples.iter().map(|sample| sample.key.to_string()))
        .collect()
}

/// The pixels of a batch of images.
pub fn pixels(batch: &Batch) -> &[u8] {
    match &batch.content {
        BatchContent::Pixels { levels, .. } => levels,
        BatchContent::Latents { .. } => panic!("latents where images were read"),
    }
}
