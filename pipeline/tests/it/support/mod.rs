//! Generated shards and servers to read them from.

pub(crate) mod proxy;
pub(crate) mod server;
pub(crate) mod web;

use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use coffey_pipeline::flow::FlowMetrics;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{
    Batch, BatchData, ImageOptions, Order, S3Options, ShardUrl, SourceError, SourceOptions,
    Sources, Stream, StreamConfig, StreamError, expand,
};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use tokio::runtime::Runtime;

use proxy::{Proxy, Rule};

/// A PNG whose pixels depend on `seed`.
pub(crate) fn picture(seed: u32, width: u32, height: u32) -> Vec<u8> {
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

/// A tar of (path, content) members.
pub(crate) fn tar_of(members: &[(String, Vec<u8>)]) -> Vec<u8> {
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
pub(crate) fn sample(shard: u32, n: u32) -> Vec<(String, Vec<u8>)> {
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
pub(crate) fn shard(shard: u32, samples: u32) -> Vec<u8> {
    let members: Vec<_> = (0..samples).flat_map(|n| sample(shard, n)).collect();
    tar_of(&members)
}

/// A bucket `data` on an S3 server behind a proxy that makes faults.
pub(crate) struct Faulty {
    pub(crate) proxy: Proxy,
    pub(crate) root: tempfile::TempDir,
    _runtime: Runtime,
}

impl Faulty {
    /// A server that takes unsigned requests; `rule` says which requests fail.
    pub(crate) fn start(rule: Rule) -> Self {
        Self::with_keys(&[], rule)
    }

    /// A server that takes requests signed with one of `keys`.
    pub(crate) fn with_keys(keys: &[&str], rule: Rule) -> Self {
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

    pub(crate) fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.root.path().join("data").join(name), content).unwrap();
    }

    /// The URLs of `name` in S3 and on a web server.
    pub(crate) fn both(&self, name: &str) -> [String; 2] {
        [
            format!("s3://data/{name}"),
            format!("{}/data/{name}", self.proxy.endpoint),
        ]
    }

    pub(crate) fn bench(&self, max_attempts: u32) -> Bench {
        Bench::s3_at(&self.proxy.endpoint, max_attempts)
    }
}

/// The runtime, sources and metrics that a test's streams share.
pub(crate) struct Bench {
    pub(crate) runtime: Runtime,
    pub(crate) sources: Sources,
    pub(crate) metrics: FlowMetrics,
}

impl Bench {
    pub(crate) fn new(options: impl Into<SourceOptions>) -> Self {
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
    pub(crate) fn embedded(root: &Path) -> Self {
        Self::new(S3Options {
            embedded_root: Some(root.to_owned()),
            ..S3Options::default()
        })
    }

    /// An S3 server at `endpoint`, without credentials.
    pub(crate) fn s3_at(endpoint: &str, max_attempts: u32) -> Self {
        Self::new(S3Options {
            endpoint_url: Some(endpoint.to_owned()),
            anonymous: true,
            path_style: true,
            max_attempts,
            stall_timeout: Duration::from_millis(300),
            ..S3Options::default()
        })
    }

    /// Reads a whole object without a stream.
    pub(crate) fn read(&self, url: &str) -> Result<Vec<u8>, SourceError> {
        self.runtime.block_on(read_object(&self.sources, url))
    }

    pub(crate) fn open(&self, config: StreamConfig) -> Result<Stream, StreamError> {
        Stream::open(config, &self.sources, &self.metrics, self.runtime.handle())
    }

    /// The next `n` batches, or the error in their place.
    pub(crate) fn batches(
        &self,
        config: StreamConfig,
        n: usize,
    ) -> Result<Vec<Batch>, StreamError> {
        take(&self.open(config)?, &self.metrics, n)
    }

    /// All batches of a stream that ends.
    pub(crate) fn all(&self, config: StreamConfig) -> Result<Vec<Batch>, StreamError> {
        self.batches(config, usize::MAX)
    }

    /// The error a stream ends with.
    pub(crate) fn error(&self, config: StreamConfig) -> StreamError {
        match self.batches(config, 10_000) {
            Ok(batches) => panic!("{} batches and no error", batches.len()),
            Err(error) => error,
        }
    }
}

pub(crate) async fn read_object(sources: &Sources, url: &str) -> Result<Vec<u8>, SourceError> {
    let mut reader = sources.open(&url.parse().unwrap()).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

pub(crate) fn take(
    stream: &Stream,
    metrics: &FlowMetrics,
    n: usize,
) -> Result<Vec<Batch>, StreamError> {
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
pub(crate) fn bucket(root: &Path, shards: u32, samples: impl Fn(u32) -> u32) -> Vec<ShardUrl> {
    std::fs::create_dir_all(root.join("data")).unwrap();
    for n in 0..shards {
        std::fs::write(root.join(format!("data/{n:05}.tar")), shard(n, samples(n))).unwrap();
    }
    urls(&format!("s3://data/{{00000..{:05}}}.tar", shards - 1))
}

pub(crate) fn urls(pattern: &str) -> Vec<ShardUrl> {
    expand(&[pattern.to_owned()]).unwrap()
}

/// A configuration for small pictures.
pub(crate) fn config(shards: Vec<ShardUrl>) -> StreamConfig {
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

/// The same configuration with every shard once and in order.
pub(crate) fn sequential(shards: Vec<ShardUrl>) -> StreamConfig {
    StreamConfig {
        order: Order::Sequential,
        ..config(shards)
    }
}

pub(crate) fn keys(batches: &[Batch]) -> Vec<String> {
    batches
        .iter()
        .flat_map(|batch| batch.samples.iter().map(|sample| sample.key.to_string()))
        .collect()
}

/// The pixels of a batch of images.
pub(crate) fn pixels(batch: &Batch) -> &[u8] {
    match &batch.data {
        BatchData::Pixels { levels, .. } => levels,
        BatchData::Latents { .. } => panic!("latents where images were read"),
    }
}
