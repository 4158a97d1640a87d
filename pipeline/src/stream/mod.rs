//! The stream: shards to batches of pixels, latents or captions, assembled from the other modules.
//!
//! ```text
//! reader      one task (fetch) and one thread (untar) per open shard
//!    │        samples, bounded in items and bytes
//! interleave  one thread per lane: selects and shuffles samples; it alone decides the lane's order
//!    │        events, in order
//! decode      decode threads, shared by the lanes: decode, resize, crop, or read latents; results are put back in order
//!    │        events, in order
//! batch       one thread per lane: collects batches, counts skipped samples, ends a stream with too many broken samples
//!    │        batches
//! turns       one thread, with several lanes: takes the lanes' batches in turn
//!    │        batches
//! consumer
//! ```
//!
//! All events travel in one sequence, also skipped samples and finished shards, so that counts and
//! summaries are independent of timing, as the samples are.

mod batch;
mod config;
mod data;
mod decode;
mod decode_limit;
mod error;
mod event;
mod explain;
mod interleave;
mod kinds;
mod left_out;
mod listed;
mod reader;
mod resume;
mod sample;
mod select;
mod shards;
mod skip;
mod turns;

pub use batch::Batch;
pub use config::{Content, StreamConfig};
pub use data::{BatchData, F16Array};
pub use decode_limit::{DecodeLimit, decode_limit};
pub use error::StreamError;
pub use listed::ListedShard;
pub use sample::SampleMeta;
pub use skip::{ShardSummary, SkipExample, SkipExamples, SkippedSample, Undelivered};

pub(crate) use skip::SkipReason;

pub(crate) use reader::{NonSample, OpenShard, ReaderContext, ShardEvent};

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::flow::{FlowMetrics, Receiver, channel, ordered_map};
use crate::order::Order;
use crate::shard::ShardUrl;
use crate::source::Sources;
use crate::stages::{DECODE_CHANNELS, FlowChannel, Stage};

use batch::{BatchOutput, Batcher};
use decode::DecodeWorker;
use interleave::Interleaver;
use kinds::{CaptionsOnly, Images, Latents, SampleKind};
use turns::{LaneOutput, Turns};

/// A running stream of batches with the data `D`. Dropping it stops its threads and tasks, and waits for the threads.
#[derive(Debug)]
pub struct Stream<D = BatchData> {
    batches: Receiver<Result<Batch<D>, StreamError>>,
    shards: Arc<[ShardUrl]>,
    undelivered: Arc<Mutex<Undelivered>>,
    cancel: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    /// Checks the configuration and starts reading. Network tasks run on `runtime`, all other work on the
    /// stream's own threads.
    ///
    /// # Errors
    /// [`StreamError`] if the configuration is invalid or threads can't be started. [`Stream::batches`] returns
    /// later errors.
    pub fn open(
        config: StreamConfig,
        sources: &Sources,
        metrics: &FlowMetrics,
        runtime: &Handle,
    ) -> Result<Self, StreamError> {
        match config.content {
            Content::Images => {
                start_stream(Images::new(&config), &config, sources, metrics, runtime)
            }
            Content::Latents(shapes) => {
                start_stream(Latents::new(shapes), &config, sources, metrics, runtime)
            }
        }
    }
}

impl Stream<()> {
    /// As [`Stream::open`], for the captions of the samples only ([`SampleMeta::caption`]).
    ///
    /// The order is that of [`Stream::open`]. Samples without the members of [`StreamConfig::content`] are skipped, but
    /// no image or array is decoded: samples that would fail to decode are not skipped. Little is read ahead.
    ///
    /// # Errors
    /// As [`Stream::open`].
    pub fn open_captions(
        config: StreamConfig,
        sources: &Sources,
        metrics: &FlowMetrics,
        runtime: &Handle,
    ) -> Result<Self, StreamError> {
        let config = StreamConfig {
            open_shards: match config.order {
                Order::Shuffled => config.open_shards,
                Order::Sequential => 1,
            },
            decode_threads: 1,
            prefetch_batches: 1,
            ..config
        };
        match config.content {
            Content::Images => {
                let captions = CaptionsOnly(Images::new(&config));
                start_stream(captions, &config, sources, metrics, runtime)
            }
            Content::Latents(shapes) => {
                let captions = CaptionsOnly(Latents::new(shapes));
                start_stream(captions, &config, sources, metrics, runtime)
            }
        }
    }
}

/// Starts the threads of a stream of one kind of sample data.
fn start_stream<K: SampleKind>(
    kind: K,
    config: &StreamConfig,
    sources: &Sources,
    metrics: &FlowMetrics,
    runtime: &Handle,
) -> Result<Stream<K::Output>, StreamError> {
    let identity = config.validate()?;
    let cancel = CancellationToken::new();
    let (sender, batches) = channel(
        metrics,
        FlowChannel::Batches.name(),
        config.prefetch_batches,
    );
    // Large enough that one slow image doesn't leave the other threads without work.
    let window = 2 * config.decode_threads.max(1) + 8;
    let decode = metrics.stage(Stage::Decode);
    let worker = DecodeWorker::new(kind.clone(), config, decode.clone());
    let make_work = || {
        let mut worker = worker.clone();
        move |job| worker.decode(job)
    };
    let hosted = config.lanes.hosted.clone();
    let (ends, mut threads) = ordered_map(
        metrics,
        &decode,
        DECODE_CHANNELS,
        config.decode_threads,
        window,
        hosted.len(),
        make_work,
    )
    .map_err(|error| StreamError::threads(&error))?;
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: metrics.clone(),
        runtime: runtime.clone(),
        held: config.held_members(),
        inspects: false,
    };
    let shards: Arc<[ShardUrl]> = config.shards.clone().into();
    let undelivered: Arc<Mutex<Undelivered>> = Arc::default();
    let batch = metrics.stage(Stage::Batch);
    let several = hosted.len() > 1;
    let mut outputs = Vec::new();
    let mut work: Vec<(String, Box<dyn FnOnce() + Send>)> = Vec::new();
    for (lane, (events, results)) in hosted.zip(ends) {
        // A lane that is the whole stream delivers its batches itself.
        let output = if several {
            let (sender, batches) = channel(metrics, FlowChannel::Batches.name(), 1);
            let undelivered = Arc::default();
            outputs.push(LaneOutput {
                batches,
                undelivered: Arc::clone(&undelivered),
            });
            BatchOutput {
                batches: sender,
                undelivered,
            }
        } else {
            BatchOutput {
                batches: sender.clone(),
                undelivered: Arc::clone(&undelivered),
            }
        };
        let lane_config = config.lane(lane);
        let batcher = Batcher::new(
            kind.clone(),
            config,
            &lane_config,
            identity.clone(),
            Arc::clone(&shards),
            output,
            batch.clone(),
        );
        let (context, cancel) = (context.clone(), cancel.clone());
        let interleaver =
            Interleaver::new(kind.clone(), config, lane_config, context, events, cancel);
        work.push((
            format!("interleave-{lane}"),
            Box::new(move || interleaver.run()),
        ));
        work.push((
            format!("batch-{lane}"),
            Box::new(move || batcher.run(&results)),
        ));
    }
    if several {
        let shared = Arc::clone(&undelivered);
        let turns = Turns::new(outputs, config, identity, shared, sender, batch);
        work.push(("turns".to_owned(), Box::new(move || turns.run())));
    } else {
        drop(sender);
    }
    let mut failed = None;
    for (name, run) in work {
        match std::thread::Builder::new().name(name).spawn(run) {
            Ok(thread) => threads.push(thread),
            Err(error) => failed = Some(StreamError::threads(&error)),
        }
    }
    let stream = Stream {
        batches,
        shards,
        undelivered,
        cancel,
        threads,
    };
    // Dropping the stream ends the threads that did start.
    match failed {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

impl<D> Stream<D> {
    /// The channel of the batches, in order. It ends after an error, and after the last batch of a
    /// [`Sequential`](crate::order::Order::Sequential) stream.
    #[must_use]
    pub fn batches(&self) -> &Receiver<Result<Batch<D>, StreamError>> {
        &self.batches
    }

    /// The shards that [`SampleMeta::shard`] and [`ShardSummary::shard`] are indices of.
    #[must_use]
    pub fn shards(&self) -> &[ShardUrl] {
        &self.shards
    }

    /// The samples and shards that no batch lists, once [`Stream::batches`] has given an error. Empty when called again.
    #[must_use]
    pub fn take_undelivered(&self) -> Undelivered {
        let mut undelivered = self
            .undelivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut undelivered)
    }
}

impl<D> Drop for Stream<D> {
    fn drop(&mut self) {
        // First, so that no more batches are delivered.
        self.batches.close();
        self.cancel.cancel();
        for thread in self.threads.drain(..) {
            // Panics were reported as errors of the stream.
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor as ByteCursor;
    use std::path::Path;

    use image::{ImageFormat, RgbImage};

    use super::*;
    use crate::source::S3Options;

    fn png() -> Vec<u8> {
        let mut bytes = ByteCursor::new(Vec::new());
        RgbImage::new(8, 8)
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// A shard of ten samples. Sample 3 has a broken image, sample 5 no image, sample 7 no caption.
    fn write_shard(path: &Path, name: &str) {
        let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
        let mut append = |member: String, content: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, member, content).unwrap();
        };
        for n in 0..10 {
            match n {
                3 => append(format!("{name}{n}.png"), b"broken"),
                5 => {}
                _ => append(format!("{name}{n}.png"), &png()),
            }
            if n != 7 {
                append(format!("{name}{n}.txt"), format!("{name} {n}").as_bytes());
            }
        }
        tar.finish().unwrap();
    }

    fn captions<D>(stream: &Stream<D>) -> Vec<(u64, String)> {
        let mut captions = Vec::new();
        while let Some(batch) = stream.batches().recv_untimed() {
            let samples = batch.unwrap().samples.into_iter();
            captions.extend(samples.map(|sample| (sample.position, sample.caption)));
            if captions.len() >= 60 {
                break;
            }
        }
        captions
    }

    #[test]
    fn captions_stream_keeps_the_order_and_broken_images() {
        let folder = tempfile::TempDir::new().unwrap();
        let paths = ["a", "b", "c"].map(|name| {
            let path = folder.path().join(format!("{name}.tar"));
            write_shard(&path, name);
            path
        });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let metrics = FlowMetrics::new();
        let sources = Sources::new(S3Options::default());
        let sources = runtime.block_on(sources).unwrap();
        for order in [Order::Sequential, Order::Shuffled] {
            let config = StreamConfig {
                shards: paths.iter().map(ShardUrl::file).collect(),
                order,
                shuffle_buffer: 8,
                open_shards: 2,
                batch_size: 4,
                max_bad_fraction: 1.0,
                ..StreamConfig::default()
            };
            let images = Stream::open(config.clone(), &sources, &metrics, runtime.handle());
            let images = captions(&images.unwrap());
            let only = Stream::open_captions(config, &sources, &metrics, runtime.handle());
            let only = captions(&only.unwrap());
            let (broken, decodable): (Vec<_>, Vec<_>) = only
                .iter()
                .cloned()
                .partition(|(_, caption)| caption.ends_with('3'));
            let compared = images.len().min(decodable.len());
            assert!(compared >= 21, "{images:?} {decodable:?}");
            assert_eq!(images[..compared], decodable[..compared], "{order:?}");
            assert!(broken.len() >= 3, "{only:?}");
            assert!(
                only.iter()
                    .all(|(_, caption)| !caption.ends_with(['5', '7']))
            );
        }
    }
}
