//! Streams captioned-image shards (WebDataset tars) out of S3 and turns them into ordered batches
//! of pixels; or shards of latents that were made of such images, into batches of latents.
//!
//! # Purpose
//! A training run reads millions of images, most of them once. This crate brings them from where
//! they are to `[B, 3, R, R]` without touching the disk, with flat memory, and in an order that can
//! be repeated and resumed.
//!
//! # Design
//! - **Order is data, speed is not.** Which sample comes when depends on seed, epoch, rank and world
//!   alone ([`order`]). Threads only change how fast it comes.
//! - **Everything is bounded.** Stages are joined by bounded channels ([`flow`]); compressed data is
//!   bounded in bytes as well. A slow consumer holds back the network.
//! - **Faults have names.** What passes is retried and goes on from the byte it had; what doesn't
//!   ends with the URL, the cause and what to set ([`SourceError`], [`StreamError`]). A broken sample
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

pub mod destination;
pub mod flow;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod image;
pub mod inspect;
pub mod metrics;
mod net;
pub mod order;
mod panic;
mod s3;
pub mod shard;
pub mod source;
pub mod stages;
mod stream;

pub use crate::image::{CropMode, ImageOptions, Interpolation};
pub use destination::Destination;
pub use flow::FlowMetrics;
pub use order::{Cursor, Order};
pub use shard::{Filter, ShardUrl, expand};
pub use source::{
    CacheCounts, CacheOptions, ObjectInfo, S3Options, SourceError, SourceOptions, Sources,
};
pub use stream::{
    Batch, BatchContent, Ceiling, Content, Halves, LatentShapes, SampleMeta, ShardSummary,
    SkippedSample, Stream, StreamConfig, StreamError, ceiling,
};
