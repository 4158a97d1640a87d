//! One open shard: a task that fetches its bytes and a thread that splits the tar into samples.

use std::cell::Cell;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::error::StreamError;
use super::listed::ListedShard;
use crate::flow::{
    Closed, FlowMetrics, Moment, StageHandle, WeightedReceiver, WeightedSender, weighted_channel,
};
use crate::panic::panic_message;
use crate::shard::{
    HeldMembers, PassedOver, Sample, ShardUrl, TAIL_BYTES, TarError, TarItem, TarOptions,
    read_samples,
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
    pub(crate) held: HeldMembers,
    /// Whether shards are inspected: parts that belong to no sample are events too.
    pub(crate) inspects: bool,
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
    NonSample(NonSample),
    /// The shard's end, and its fault if the end is not regular.
    End {
        broken: Option<String>,
    },
    Failed(StreamError),
}

enum Chunk {
    Data(Bytes),
    End,
    Failed(StreamError),
}

/// Size and hash of a shard, as far as its bytes were read.
#[derive(Debug, Default)]
struct Fetched {
    size: AtomicU64,
    /// Whether the reader compares the bytes with a hash at their end.
    is_verified: AtomicBool,
    /// Time at which the last byte was fetched.
    at: OnceLock<Instant>,
    /// SHA-256 of all bytes, hexadecimal; set where it is computed.
    sha256: OnceLock<String>,
}

/// A shard being read. Dropping it stops the task and the thread and waits for the thread.
#[derive(Debug)]
pub(crate) struct OpenShard {
    events: Option<WeightedReceiver<ShardEvent>>,
    fetched: Arc<Fetched>,
    stage: StageHandle,
    cancel: CancellationToken,
    fetch: tokio::task::JoinHandle<()>,
    untar: Option<JoinHandle<()>>,
}

impl OpenShard {
    /// Starts to read `url`. Where it is `listed`, a shard that differs fails.
    pub(crate) fn start(
        context: &ReaderContext,
        url: &ShardUrl,
        listed: Option<ListedShard>,
    ) -> io::Result<Self> {
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
        let fetched = Arc::new(Fetched::default());
        let untar = Untar {
            url: url.clone(),
            listed: listed.clone(),
            chunks: chunk_receiver,
            cancel: cancel.clone(),
            events: event_sender,
            fetched: Arc::clone(&fetched),
            stage: metrics.stage(Stage::Untar),
            options: TarOptions {
                held: context.held.clone(),
                // When inspecting, the archive's tail is read to the end.
                max_tail_bytes: if context.inspects {
                    u64::MAX
                } else {
                    TAIL_BYTES
                },
            },
            inspects: context.inspects,
        };
        let untar = std::thread::Builder::new()
            .name("untar".to_owned())
            .spawn(move || untar.run())?;
        let fetch = Fetch {
            sources: context.sources.clone(),
            url: url.clone(),
            is_hashed: listed.is_some() || context.inspects,
            listed,
            chunks: chunk_sender,
            stage: metrics.stage(Stage::Fetch),
            fetched: Arc::clone(&fetched),
        };
        let claimed = context.sources.claim(url);
        Ok(Self {
            events: Some(event_receiver),
            fetched,
            stage: metrics.stage(Stage::Fetch),
            cancel,
            fetch: context.runtime.spawn(fetch.run(claimed)),
            untar: Some(untar),
        })
    }

    /// Waits for the next event; `None` when cancelled, or after the end.
    pub(crate) fn next(&self, cancel: &CancellationToken) -> Option<ShardEvent> {
        self.events.as_ref()?.recv_blocking(cancel)
    }

    /// The shard's size; the bytes fetched so far if the source does not tell the size.
    pub(crate) fn size(&self) -> u64 {
        self.fetched.size.load(Ordering::Relaxed)
    }

    /// SHA-256 of the shard, hexadecimal, once its end was delivered; empty unless inspecting or listed.
    pub(crate) fn sha256(&self) -> String {
        self.fetched.sha256.get().cloned().unwrap_or_default()
    }
}

impl Drop for OpenShard {
    fn drop(&mut self) {
        drop(self.events.take());
        self.cancel.cancel();
        self.fetch.abort();
        // Since the last byte was fetched, the fetch stage has waited for the rest of the stream.
        if let Some(fetched_at) = self.fetched.at.get() {
            self.stage.add_blocked(fetched_at.elapsed());
        }
        if let Some(untar) = self.untar.take() {
            // The thread itself catches and reports panics.
            untar.join().ok();
        }
    }
}

/// The task that fetches a shard's bytes.
struct Fetch {
    sources: Sources,
    url: ShardUrl,
    listed: Option<ListedShard>,
    /// Whether the SHA-256 of the bytes is computed.
    is_hashed: bool,
    chunks: WeightedSender<Chunk>,
    stage: StageHandle,
    fetched: Arc<Fetched>,
}

impl Fetch {
    async fn run(self, claimed: Result<(), SourceError>) {
        let fetched = match claimed {
            Ok(()) => self.fetch_all().await,
            Err(error) => Ok(Err(error.into())),
        };
        let last = match fetched {
            Ok(Ok(())) => {
                self.stage.add_items(1);
                Chunk::End
            }
            Ok(Err(error)) => Chunk::Failed(error),
            // The untar thread has ended.
            Err(Closed) => return,
        };
        // Fails only if the untar thread has ended.
        self.chunks.send(last, 0, &self.stage).await.ok();
        self.fetched.at.get_or_init(Instant::now);
    }

    async fn fetch_all(&self) -> Result<Result<(), StreamError>, Closed> {
        let Self { chunks, stage, .. } = self;
        let start = Instant::now();
        let opened = self.sources.open_shard(&self.url).await;
        stage.add_busy(start.elapsed());
        let mut reader = match opened {
            Ok(reader) => reader,
            Err(error) => return Ok(Err(error.into())),
        };
        if let (Some(listed), Some(size)) = (&self.listed, reader.size())
            && let Err(error) = listed.check_bytes(&self.url, size)
        {
            return Ok(Err(error));
        }
        let is_verified = reader.is_verified();
        self.fetched
            .is_verified
            .store(is_verified, Ordering::Relaxed);
        let size = &self.fetched.size;
        size.store(reader.size().unwrap_or(0), Ordering::Relaxed);
        let mut fetched = 0;
        let mut hash = self.is_hashed.then(Sha256::new);
        let mut gathered = BytesMut::new();
        loop {
            // Waiting for the network counts as the work of this stage.
            let start = Instant::now();
            let next = reader.next().await;
            if let (Some(hash), Ok(Some(chunk))) = (&mut hash, &next) {
                hash.update(chunk);
            }
            stage.add_busy(start.elapsed());
            let chunk = match next {
                Ok(Some(chunk)) => chunk,
                Ok(None) => {
                    if !gathered.is_empty() {
                        let rest = gathered.split().freeze();
                        let bytes = rest.len();
                        chunks.send(Chunk::Data(rest), bytes, stage).await?;
                    }
                    return Ok(self.finish(fetched, hash));
                }
                Err(error) => return Ok(Err(error.into())),
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

    /// Compares the whole shard with its entry in the manifest.
    fn finish(&self, bytes: u64, hash: Option<Sha256>) -> Result<(), StreamError> {
        let Some(hash) = hash else {
            return Ok(());
        };
        let sha256 = format!("{:x}", hash.finalize());
        if let Some(listed) = &self.listed {
            listed.check_bytes(&self.url, bytes)?;
            listed.check_sha256(&self.url, &sha256)?;
        }
        self.fetched.sha256.get_or_init(|| sha256);
        Ok(())
    }
}

/// The fetched bytes as a reader for the tar thread.
struct ChunkReader<'a> {
    receiver: &'a WeightedReceiver<Chunk>,
    cancel: &'a CancellationToken,
    current: Bytes,
    ended: bool,
    /// Why the bytes ended early. The tar reader does not keep the source of an [`io::Error`].
    failure: &'a Cell<Option<StreamError>>,
    /// Time waited since the value was last taken.
    starved: &'a Cell<Duration>,
}

impl Read for ChunkReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A chunk in gzip may expand to much.
        if self.cancel.is_cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
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
                None => {
                    if !self.cancel.is_cancelled() {
                        // A task that panicked says nothing of the shard.
                        let panicked = || StreamError::Panicked {
                            stage: Stage::Fetch,
                            message: "its task ended without a result".to_owned(),
                        };
                        let failure = self.failure.take().unwrap_or_else(panicked);
                        self.failure.set(Some(failure));
                    }
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
        let length = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

struct Untar {
    url: ShardUrl,
    listed: Option<ListedShard>,
    chunks: WeightedReceiver<Chunk>,
    cancel: CancellationToken,
    events: WeightedSender<ShardEvent>,
    fetched: Arc<Fetched>,
    stage: StageHandle,
    options: TarOptions,
    inspects: bool,
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

    /// Delivers every sample. Returns how the shard ended, `None` if the shard is being dropped.
    fn read(&self) -> Option<ShardEvent> {
        let stage = &self.stage;
        let (failure, starved) = (Cell::new(None), Cell::new(Duration::ZERO));
        let mut reader = ChunkReader {
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
        let mut samples = 0;
        let result = read_samples(&mut reader, &self.options, |item| {
            let (event, bytes) = match item {
                TarItem::Sample(sample) => {
                    samples += 1;
                    stage.add_items(1);
                    stage.add_bytes(sample.bytes() as u64);
                    let bytes = sample.held_bytes();
                    (ShardEvent::Sample(sample), bytes)
                }
                _ if !self.inspects => return ControlFlow::Continue(()),
                TarItem::PassedOver(member) => {
                    (ShardEvent::NonSample(NonSample::Member(member)), 0)
                }
                TarItem::Trailing(bytes) => (ShardEvent::NonSample(NonSample::Trailing(bytes)), 0),
            };
            account(since);
            closed = self.events.send_blocking(event, bytes, stage).is_err();
            since = stage.begin();
            if closed {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let is_tar = !matches!(result, Err(TarError::NotATar(_)));
        let is_hashed = is_tar && (self.listed.is_some() || self.inspects);
        // A fault of a copy in the cache is one of the shard only if the hash is right.
        let is_doubted = result.is_err() && self.fetched.is_verified.load(Ordering::Relaxed);
        if !closed && (is_hashed || is_doubted) {
            // The hash is that of the whole shard, also behind a fault. The failure of the rest is in `failure`.
            io::copy(&mut reader, &mut io::sink()).ok();
        }
        account(since);
        if closed || self.cancel.is_cancelled() {
            return None;
        }
        if let Some(error) = failure.take() {
            return Some(ShardEvent::Failed(error));
        }
        if let Some(listed) = &self.listed
            && is_tar
            && let Err(error) = listed.check_samples(&self.url, samples)
        {
            return Some(ShardEvent::Failed(error));
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
