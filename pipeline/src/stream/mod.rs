//! The stream: shards to batches of pixels or latents, assembled from the other modules.
//!
//! ```text
//! reader      one task (fetch) and one thread (untar) for each open shard
//!    │        samples, bounded in items and bytes
//! interleave  one thread: chooses the next sample, filters, shuffles; all of the order is here
//!    │        steps, in order
//! prepare     decode threads: decode, resize, crop, or read latents; results put back in order
//!    │        steps, in order
//! batch       one thread: collects batches, counts what was left out, ends a stream that is too broken
//!    │        batches
//! consumer
//! ```
//!
//! Everything that happens travels as a step in one sequence, also a skipped sample and a finished
//! shard, so that counts and summaries are as independent of timing as the samples are.

mod batch;
mod ceiling;
mod config;
mod content;
mod error;
mod interleave;
mod latent;
mod prepare;
mod reader;
mod restore;
mod step;

pub use batch::{Batch, ShardSummary, SkippedSample};
pub use ceiling::{Ceiling, ceiling};
pub use config::StreamConfig;
pub use content::{BatchContent, Content, Halves, LatentShapes};
pub use error::StreamError;
pub use prepare::SampleMeta;

pub(crate) use content::{LATENT, PROMPT_EMBEDS};
pub(crate) use latent::{Array, read_halves};
pub(crate) use reader::{Note, OpenShard, ReaderContext, ShardEvent};
pub(crate) use step::parse_json;

use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::flow::{FlowMetrics, Receiver, channel, ordered_map};
use crate::shard::ShardUrl;
use crate::source::Sources;
use crate::stages::{DECODE_CHANNELS, FlowChannel, Stage};

use batch::Batcher;
use interleave::Interleaver;
use prepare::Preparer;

/// A running stream. Dropping it stops its threads and tasks and waits for the threads.
#[derive(Debug)]
pub struct Stream {
    batches: Receiver<Result<Batch, StreamError>>,
    shards: Vec<ShardUrl>,
    cancel: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    /// Checks the configuration and starts reading, on `runtime` for what waits for the network and
    /// on threads of its own for the rest.
    ///
    /// # Errors
    /// [`StreamError`] if the configuration can't work or threads can't be started. What goes wrong
    /// later comes out of [`Stream::batches`].
    pub fn open(
        config: StreamConfig,
        sources: &Sources,
        metrics: &FlowMetrics,
        runtime: &Handle,
    ) -> Result<Self, StreamError> {
        let identity = config.validate()?;
        let cancel = CancellationToken::new();
        let (sender, batches) = channel(
            metrics,
            FlowChannel::Batches.name(),
            config.prefetch_batches,
        );
        // Enough that a slow image doesn't leave the other threads without work.
        let window = 2 * config.decode_threads.max(1) + 8;
        let decode = metrics.stage(Stage::Decode);
        let preparer = Preparer::new(&config, decode.clone());
        let make_work = || {
            let mut preparer = preparer.clone();
            move |job| preparer.prepare(job)
        };
        let (steps, results, mut threads) = ordered_map(
            metrics,
            &decode,
            DECODE_CHANNELS,
            config.decode_threads,
            window,
            make_work,
        )
        .map_err(|error| StreamError::threads(&error))?;
        let context = ReaderContext {
            sources: sources.clone(),
            metrics: metrics.clone(),
            runtime: runtime.clone(),
            max_member_bytes: config.image.max_bytes,
            notes: None,
        };
        let shards = config.shards.clone();
        let batcher = Batcher::new(&config, identity, sender, metrics.stage(Stage::Batch));
        let interleaver = Interleaver::new(config, context, steps, cancel.clone());
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(run)
        };
        let order = spawn("order", Box::new(move || interleaver.run()));
        let collect = spawn("batch", Box::new(move || batcher.run(&results)));
        let mut failed = None;
        for thread in [order, collect] {
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => failed = Some(StreamError::threads(&error)),
            }
        }
        let stream = Self {
            batches,
            shards,
            cancel,
            threads,
        };
        // Dropping the stream ends what did start.
        match failed {
            Some(error) => Err(error),
            None => Ok(stream),
        }
    }

    /// Where batches come out, in order. After an error, and after the last batch of a
    /// [`Sequential`](crate::order::Order::Sequential) stream, the channel ends.
    #[must_use]
    pub fn batches(&self) -> &Receiver<Result<Batch, StreamError>> {
        &self.batches
    }

    /// The shards, as [`SampleMeta::shard`] and [`ShardSummary::shard`] count them.
    #[must_use]
    pub fn shards(&self) -> &[ShardUrl] {
        &self.shards
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The consumer's end first, so that nothing half done is delivered.
        self.batches.close();
        self.cancel.cancel();
        for thread in self.threads.drain(..) {
            // A panic in it was reported through the stream.
            let _panicked = thread.join();
        }
    }
}
