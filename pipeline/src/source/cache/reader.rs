//! Reading a shard out of the cache, or through it into the cache.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use async_channel::{Receiver, Sender, bounded};
use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;

use super::{Cache, PART_ENDING, PART_PREFIX, Reservation, file, remove};
use crate::flow::FlowMetrics;
use crate::shard::ShardUrl;
use crate::source::Reader;
use crate::source::error::SourceError;
use crate::source::remote::{Known, Remote, RemoteReader};
use crate::source::retry::RetryOptions;

const CHUNK_BYTES: usize = 256 << 10;
/// Fetched pieces that wait for the disk, for each shard.
const WAITING_CHUNKS: usize = 16;

/// Opens a shard out of the cache if the one that is kept still is the server's, else from the server,
/// and keeps it.
pub(crate) async fn open_shard(
    cache: &Arc<Cache>,
    url: &ShardUrl,
    remote: Remote,
    options: RetryOptions,
    metrics: FlowMetrics,
) -> Result<Reader, SourceError> {
    let name = Cache::name(remote.server(), url);
    // Opened before the server is asked: from then on nobody can take it away.
    let kept = look_up(cache, &name).await;
    let known = kept.as_ref().map(|(_, known)| known);
    let opened =
        RemoteReader::open_unless(url, remote.clone(), options, metrics.clone(), known).await?;
    Ok(match (opened, kept) {
        (Some(reader), _) => {
            cache.misses.fetch_add(1, Ordering::Relaxed);
            let keeper = Keeper::start(cache, &name, url, &reader);
            Reader::Caching(Box::new(CachingReader { reader, keeper }))
        }
        (None, Some((file, known))) => {
            cache.hits.fetch_add(1, Ordering::Relaxed);
            // The time of last use. Only the order of eviction hangs on it.
            let _unchanged = file.set_modified(SystemTime::now());
            Reader::Cached(Box::new(CachedReader {
                cache: Arc::clone(cache),
                name,
                url: url.clone(),
                remote,
                options,
                metrics,
                rest: Rest::Disk(tokio::fs::File::from_std(file)),
                known,
                offset: 0,
            }))
        }
        // Without a known version the object is always sent.
        (None, None) => {
            return Err(SourceError::Refused {
                url: url.redacted(),
                cause: "the server sent nothing".to_owned(),
            });
        }
    })
}

async fn look_up(cache: &Arc<Cache>, name: &str) -> Option<(File, Known)> {
    let (cache, path) = (Arc::clone(cache), cache.path(name));
    let look = move || -> io::Result<Option<(File, Known)>> {
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match file::unseal(&mut file)? {
            Some(known) => Ok(Some((file, known))),
            // Cut by a crash of the machine.
            None => remove(&path).map(|()| None),
        }
    };
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            cache.turn_off(&error);
            None
        }
        Err(_panicked) => None,
    }
}

/// A shard being read from disk. Should the disk fail, the rest comes from the server.
#[derive(Debug)]
pub(crate) struct CachedReader {
    cache: Arc<Cache>,
    name: String,
    url: ShardUrl,
    remote: Remote,
    options: RetryOptions,
    metrics: FlowMetrics,
    rest: Rest,
    known: Known,
    offset: u64,
}

#[derive(Debug)]
enum Rest {
    Disk(tokio::fs::File),
    Server(Box<RemoteReader>),
}

impl CachedReader {
    pub(crate) fn size(&self) -> u64 {
        self.known.size
    }

    pub(crate) fn version(&self) -> Option<&str> {
        self.known.version.as_deref()
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let file = match &mut self.rest {
            Rest::Disk(file) => file,
            Rest::Server(reader) => return reader.next().await,
        };
        let left = self.known.size - self.offset;
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        let cause = match file.take(left).read_buf(&mut chunk).await {
            Ok(0) => "it ends too early".to_owned(),
            Ok(read) => {
                self.offset += read as u64;
                return Ok(Some(chunk.freeze()));
            }
            Err(error) => error.to_string(),
        };
        self.leave_the_disk(&cause).await?;
        match &mut self.rest {
            Rest::Server(reader) => reader.next().await,
            Rest::Disk(_) => Ok(None),
        }
    }

    async fn leave_the_disk(&mut self, cause: &str) -> Result<(), SourceError> {
        let path = self.cache.path(&self.name);
        tracing::warn!(
            shard = %self.url.redacted(),
            file = %path.display(),
            cause,
            "a kept shard can't be read: it is removed, and the rest streamed"
        );
        if let Err(error) = remove(&path) {
            self.cache.turn_off(&error);
        }
        let reader = RemoteReader::resume(
            &self.url,
            self.remote.clone(),
            self.options,
            self.metrics.clone(),
            &self.known,
            self.offset,
        );
        self.rest = Rest::Server(Box::new(reader.await?));
        Ok(())
    }
}

/// A shard being read from the server, and kept on the way.
#[derive(Debug)]
pub(crate) struct CachingReader {
    reader: RemoteReader,
    keeper: Option<Keeper>,
}

impl CachingReader {
    pub(crate) fn size(&self) -> Option<u64> {
        self.reader.size()
    }

    pub(crate) fn version(&self) -> Option<&str> {
        self.reader.version()
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let next = self.reader.next().await?;
        let message = match &next {
            Some(chunk) => Message::Data(chunk.clone()),
            None => Message::End,
        };
        if let Some(keeper) = &self.keeper
            && keeper.0.send(message).await.is_err()
        {
            self.keeper = None;
        }
        Ok(next)
    }
}

enum Message {
    Data(Bytes),
    /// All of it has come. Without this what was written is thrown away.
    End,
}

/// The way to the task that writes a shard to disk. It ends with this, and says why by itself.
#[derive(Debug)]
struct Keeper(Sender<Message>);

impl Keeper {
    fn start(
        cache: &Arc<Cache>,
        name: &str,
        url: &ShardUrl,
        reader: &RemoteReader,
    ) -> Option<Self> {
        let (version, size) = (reader.version().map(str::to_owned), reader.size());
        if version.is_none() && size.is_none() {
            if !cache.said.nameless.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    shard = %url.redacted(),
                    "the server says neither version nor length of its shards: they can't be kept in data.cache_dir"
                );
            }
            return None;
        }
        let reservation = cache.reserve(name, size.unwrap_or(0))?;
        let (sender, messages) = bounded(WAITING_CHUNKS);
        let writing = Writing {
            reservation,
            url: url.redacted(),
            version,
            messages,
        };
        // It waits for pieces and for the disk, on a thread made for that. The runtime waits for it.
        tokio::task::spawn_blocking(move || writing.run());
        Some(Self(sender))
    }
}

struct Writing {
    reservation: Reservation,
    url: String,
    version: Option<String>,
    messages: Receiver<Message>,
}

impl Writing {
    fn run(self) {
        let cache = Arc::clone(&self.reservation.cache);
        if let Err(error) = self.write() {
            cache.turn_off(&error);
        }
    }

    fn write(self) -> io::Result<()> {
        let cache = &self.reservation.cache;
        cache.make_room()?;
        let mut part = tempfile::Builder::new()
            .prefix(PART_PREFIX)
            .suffix(&format!(".{PART_ENDING}"))
            .tempfile_in(&cache.options.folder)?;
        let mut size = 0;
        loop {
            match self.messages.recv_blocking() {
                Ok(Message::Data(chunk)) => {
                    size += chunk.len() as u64;
                    if size > cache.options.limit_bytes {
                        return Ok(());
                    }
                    part.write_all(&chunk)?;
                }
                Ok(Message::End) => break,
                Err(_not_whole) => return Ok(()),
            }
        }
        let known = Known {
            version: self.version,
            size,
        };
        file::seal(&mut part, &self.url, &known)?;
        // A name must not outlive a crash that the content did not.
        part.as_file().sync_data()?;
        match part.persist(cache.path(&self.reservation.name)) {
            Ok(_file) => {}
            // Cleared away as a leftover by another process, after a day's standstill.
            Err(failed) if failed.error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(failed) => return Err(failed.error),
        }
        let cache = Arc::clone(cache);
        drop(self.reservation);
        cache.make_room()
    }
}
