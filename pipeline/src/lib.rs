//! Streams shards of captioned images (WebDataset tars) from S3 into ordered batches of pixels, and shards of
//! latents into batches of latents.
//!
//! # Purpose
//! A training run reads millions of images, most of them once. This crate streams them to `[B, 3, R, R]`
//! without touching the disk, with flat memory, and in an order that can be repeated and resumed.
//!
//! # Design
//! - **The order is independent of speed.** It depends on seed, epoch, rank and world only ([`order`]). Threads
//!   change only how fast samples arrive.
//! - **Everything is bounded.** Bounded channels join the stages ([`flow`]); compressed data is also
//!   bounded in bytes. A slow consumer slows down the network.
//! - **Faults have names.** Transient faults are retried from the byte reached. Other faults end the stream with
//!   the URL, the cause and the setting to change ([`SourceError`], [`StreamError`]). A broken sample
//!   is skipped and counted by its reason.
//! - **No tensors.** The crate knows S3, tar and images, and no machine-learning library.
//!
//! # Example
//! ```no_run
//! use coffey_pipeline::flow::FlowMetrics;
//! use coffey_pipeline::stages::Stage;
//! use coffey_pipeline::{S3Options, Sources, Stream, StreamConfig, expand};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let runtime = tokio::runtime::Runtime::new()?;
//! let sources = runtime.block_on(Sources::new(S3Options::default()))?;
//! let urls = expand(&["s3://bucket/data/{00000..01210}.tar".to_owned()])?;
//! let config = StreamConfig {
//!     shards: runtime.block_on(sources.list(&urls))?,
//!     batch_size: 12,
//!     seed: 453_645_634,
//!     ..StreamConfig::default()
//! };
//! let metrics = FlowMetrics::new();
//! let stream = Stream::open(config, &sources, &metrics, runtime.handle())?;
//! let consumer = metrics.stage(Stage::Train);
//! while let Some(batch) = stream.batches().recv_blocking(&consumer) {
//!     let batch = batch?;
//!     println!("{}: {:?}", batch.index, batch.samples[0].caption);
//! }
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod bounded;
pub mod destination;
pub mod flow;
pub mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod image;
mod image_folder;
pub mod inspect;
pub mod json;
pub mod metrics;
mod net;
pub mod open_files;
pub mod order;
pub mod pack;
mod panic;
mod plural;
pub mod regular_file;
mod s3;
pub mod shard;
pub mod source;
pub mod stages;
mod stream;
pub mod text;

pub use crate::image::{CropMode, ImageOptions, Interpolation};
pub use destination::{ConditionalWrite, Destination, WriteCondition};
pub use flow::FlowMetrics;
pub use format::latents::LatentShapes;
pub use order::{Cursor, Lanes, Order};
pub use plural::counted;
pub use shard::{Filter, ShardPattern, ShardUrl, expand};
pub use source::{
    CacheCounts, CacheOptions, HttpHeader, HubOptions, LookUp, MemberKeys, ObjectInfo, S3Options,
    ShardList, SourceError, SourceOptions, Sources,
};
pub use stream::{
    Batch, BatchData, Content, DecodeLimit, F16Array, ListedShard, SampleMeta, ShardSummary,
    SkipExample, SkipExamples, SkippedSample, Stream, StreamConfig, StreamError, Undelivered,
    decode_limit,
};
