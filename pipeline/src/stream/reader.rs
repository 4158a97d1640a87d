//! One open shard: a task that fetches its bytes and a thread that splits the tar into samples.

use std::cell::Cell;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::error::StreamError;
use crate::flow::{
    Closed, FlowMetrics, Moment, StageHandle, WeightedReceiver, WeightedSender, weighted_channel,
};
use crate::panic::panic_message;
use crate::shard::{
    PassedOver, Sample, ShardUrl, TAIL_BYTES, TarError, TarItem, TarOptions, read_samples,
};
use crate::source::{SourceError, Sources};
use crate::stages::{FlowChannel, Stage};

/// Bytes fetched ahead of the tar reader, for each open shard.
const CHUNKS_BYTES: u32 = 4 << 20;
const CHUNKS_ITEMS: usize = 64;
/// Samples read ahead of the interleaver, for each open shard.
const SAMPLES_BYTES: u32 = 8 << 20;
const SAMPLES_ITEMS: usize = 32;
/// Fetched pieces are joined to this size, because servers send pieces as small as 4 KiB.
const GATHERED_BYTES: usize = 64 << 10;

/// Shared objects that opening a shard needs.
#[derive(Debug, Clone)]
pub(crate) struct ReaderContext {
    pub(crate) sources: Sources,
    pub(crate) metrics: FlowMetrics,
    pub(crate) runtime: Handle,
    pub(crate) max_member_bytes: u64,
    /// Receiver of the parts of a shard that belong to no sample; `None` unless inspecting.
    pub(crate) non_samples: Option<mpsc::Sender<NonSample>>,
}

/// A part of a shard that belongs to no sample.
#[derive(Debug)]
pub(crate) enum NonSample {
    Member(PassedOver),
    /// Number of bytes after the end of the archive, not all of them zero.
    Trailing(u64),
}

/// An event of an open shard.
#[derive(Debug)]
pub(crate) enum ShardEvent {
    Sample(Sample),
    /// The shard's end, and its fault if the end is not regular.
    End {
        broken: Option<String>,
    },
    Failed(StreamError),
}

enum Chunk {
    Data(Bytes),
    End,
    Failed(SourceError),
}

/// A shard being read. Dropping it stops the task and the thread and waits for the thread.
#[derive(Debug)]
pub(crate) struct OpenShard {
    events: Option<WeightedReceiver<ShardEvent>>,
    size: Arc<AtomicU64>,
    /// Time at which the last byte was fetched.
    fetched_at: Arc<OnceLock<Instant>>,
    stage: StageHandle,
    cancel: CancellationToken,
    fetch: tokio::task::JoinHandle<()>,
    untar: Option<JoinHandle<()>>,
}

impl OpenShard {
    /// Starts to read `url`.
    pub(crate) fn start(context: &ReaderContext, url: &ShardUrl) -> io::Result<Self> {
        let metrics = &context.metrics;
        let cancel = CancellationToken::new();
        let (chunk_sender, chunk_receiver) = weighted_channel(
            metrics,
            FlowChannel::Chunks.name(),
            CHUNKS_ITEMS,
            CHUNKS_BYTES,
        );
        let (event_sender, event_receiver) = weighted_channel(
            metrics,
            FlowChannel::Samples.name(),
            SAMPLES_ITEMS,
            SAMPLES_BYTES,
        );
        let size = Arc::new(AtomicU64::new(0));
        let fetched_at = Arc::new(OnceLock::new());
        let untar = Untar {
            url: url.clone(),
            chunks: chunk_receiver,
            cancel: cancel.clone(),
            events: event_sender,
            stage: metrics.stage(Stage::Untar),
            options: TarOptions {
                max_member_bytes: context.max_member_bytes,
                // When inspecting, the archive's tail is read to the end.
                max_tail_bytes: context
                    .non_samples
                    .as_ref()
                    .map_or(TAIL_BYTES, |_| u64::MAX),
            },
            non_samples: context.non_samples.clone(),
        };
        let untar = std::thread::Builder::new()
            .name("untar".to_owned())
            .spawn(move || untar.run())?;
        let claimed = context.sources.claim(url);
        let fetch = fetch(
            context.sources.clone(),
            claimed.map(|()| url.clone()),
            chunk_sender,
            metrics.stage(Stage::Fetch),
            Arc::clone(&size),
            Arc::clone(&fetched_at),
        );
        Ok(Self {
            events: Some(event_receiver),
            size,
            fetched_at,
            stage: metrics.stage(Stage::Fetch),
            cancel,
            fetch: context.runtime.spawn(fetch),
            untar: Some(untar),
        })
    }

    /// Waits for the next event; `None` when cancelled, or after the end.
    pub(crate) fn next(&self, cancel: &CancellationToken) -> Option<ShardEvent> {
        self.events.as_ref()?.recv_blocking(cancel)
    }

    /// The shard's size; the bytes fetched so far if the source does not tell the size.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
}

impl Drop for OpenShard {
    fn drop(&mut self) {
        drop(self.events.take());
        self.cancel.cancel();
        self.fetch.abort();
        // Since the last byte was fetched, the fetch stage has waited for the rest of the stream.
        if let Some(fetched_at) = self.fetched_at.get() {
            self.stage.add_blocked(fetched_at.elapsed());
        }
        if let Some(untar) = self.untar.take() {
            // The thread itself catches and reports panics.
            untar.join().ok();
        }
    }
}

async fn fetch(
    sources: Sources,
    url: Result<ShardUrl, SourceError>,
    chunks: WeightedSender<Chunk>,
    stage: StageHandle,
    size: Arc<AtomicU64>,
    fetched_at: Arc<OnceLock<Instant>>,
) {
    let fetched = match url {
        Ok(url) => fetch_all(&sources, &url, &chunks, &stage, &size).await,
        Err(error) => Ok(Err(error)),
    };
    let last = match fetched {
        Ok(Ok(())) => {
            stage.add_items(1);
            Chunk::End
        }
        Ok(Err(error)) => Chunk::Failed(error),
        // The untar thread has ended.
        Err(Closed) => return,
    };
    // Fails only if the untar thread has ended.
    chunks.send(last, 0, &stage).await.ok();
    fetched_at.get_or_init(Instant::now);
}

async fn fetch_all(
    sources: &Sources,
    url: &ShardUrl,
    chunks: &WeightedSender<Chunk>,
    stage: &StageHandle,
    size: &AtomicU64,
) -> Result<Result<(), SourceError>, Closed> {
    let start = Instant::now();
    let opened = sources.open_shard(url).await;
    stage.add_busy(start.elapsed());
    let mut reader = match opened {
        Ok(reader) => reader,
        Err(error) => return Ok(Err(error)),
    };
    size.store(reader.size().unwrap_or(0), Ordering::Relaxed);
    let mut fetched = 0;
    let mut gathered = BytesMut::new();
    loop {
        // Waiting for the network counts as the work of this stage.
        let start = Instant::now();
        let next = reader.next().await;
        stage.add_busy(start.elapsed());
        let chunk = match next {
            Ok(Some(chunk)) => chunk,
            Ok(None) => {
                if !gathered.is_empty() {
                    let rest = gathered.split().freeze();
                    let bytes = rest.len();
                    chunks.send(Chunk::Data(rest), bytes, stage).await?;
                }
                return Ok(Ok(()));
            }
            Err(error) => return Ok(Err(error)),
        };
        stage.add_bytes(chunk.len() as u64);
        fetched += chunk.len() as u64;
        size.fetch_max(fetched, Ordering::Relaxed);
        let ready = if gathered.is_empty() && chunk.len() >= GATHERED_BYTES {
            chunk
        } else {
            gathered.extend_from_slice(&chunk);
            if gathered.len() < GATHERED_BYTES {
                continue;
            }
            gathered.split().freeze()
        };
        let bytes = ready.len();
        chunks.send(Chunk::Data(ready), bytes, stage).await?;
    }
}

/// The fetched bytes as a reader for the tar thread.
struct ChunkReader<'a> {
    receiver: &'a WeightedReceiver<Chunk>,
    cancel: &'a CancellationToken,
    current: Bytes,
    ended: bool,
    /// Why the bytes ended early. The tar reader does not keep the source of an [`io::Error`].
    failure: &'a Cell<Option<SourceError>>,
    /// Time waited since the value was last taken.
    starved: &'a Cell<Duration>,
}

impl Read for ChunkReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            let start = Instant::now();
            let chunk = self.receiver.recv_blocking(self.cancel);
            self.starved.set(self.starved.get() + start.elapsed());
            match chunk {
                Some(Chunk::Data(data)) => self.current = data,
                Some(Chunk::End) => self.ended = true,
                Some(Chunk::Failed(error)) => {
                    self.failure.set(Some(error));
                    return Err(io::Error::other("the source failed"));
                }
                None => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

struct Untar {
    url: ShardUrl,
    chunks: WeightedReceiver<Chunk>,
    cancel: CancellationToken,
    events: WeightedSender<ShardEvent>,
    stage: StageHandle,
    options: TarOptions,
    non_samples: Option<mpsc::Sender<NonSample>>,
}

impl Untar {
    fn run(self) {
        let last = match catch_unwind(AssertUnwindSafe(|| self.read())) {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(payload) => ShardEvent::Failed(StreamError::Panicked {
                stage: Stage::Untar,
                message: panic_message(payload.as_ref()),
            }),
        };
        // Fails only if the shard is being dropped.
        self.events.send_blocking(last, 0, &self.stage).ok();
    }

    fn report(&self, part: NonSample) {
        if let Some(non_samples) = &self.non_samples {
            // Fails only if the inspection was dropped.
            non_samples.send(part).ok();
        }
    }

    /// Delivers every sample. Returns how the shard ended, `None` if the shard is being dropped.
    fn read(&self) -> Option<ShardEvent> {
        let stage = &self.stage;
        let (failure, starved) = (Cell::new(None), Cell::new(Duration::ZERO));
        let reader = ChunkReader {
            receiver: &self.chunks,
            cancel: &self.cancel,
            current: Bytes::new(),
            ended: false,
            failure: &failure,
            starved: &starved,
        };
        let mut since = stage.begin();
        let account = |since: Moment| {
            let waited = starved.take();
            stage.add_starved(waited);
            stage.add_work(since, waited);
        };
        let mut closed = false;
        let result = read_samples(reader, self.options, |item| {
            let sample = match item {
                TarItem::Sample(sample) => sample,
                TarItem::PassedOver(member) => {
                    self.report(NonSample::Member(member));
                    return ControlFlow::Continue(());
                }
                TarItem::Trailing(bytes) => {
                    self.report(NonSample::Trailing(bytes));
                    return ControlFlow::Continue(());
                }
            };
            account(since);
            let bytes = sample.bytes();
            stage.add_items(1);
            stage.add_bytes(bytes as u64);
            closed = self
                .events
                .send_blocking(ShardEvent::Sample(sample), bytes, stage)
                .is_err();
            since = stage.begin();
            if closed {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        account(since);
        if closed || self.cancel.is_cancelled() {
            return None;
        }
        if let Some(error) = failure.take() {
            return Some(ShardEvent::Failed(StreamError::Source(error)));
        }
        Some(match result {
            Ok(()) => ShardEvent::End { broken: None },
            Err(TarError::Broken(cause)) => ShardEvent::End {
                broken: Some(cause),
            },
            Err(TarError::NotATar(cause)) => ShardEvent::Failed(StreamError::NotATar {
                url: self.url.to_string(),
                cause,
            }),
        })
    }
}
