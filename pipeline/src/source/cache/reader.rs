//! Reading a shard out of the cache, or through it into the cache.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use async_channel::{Receiver, Sender, bounded};
use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;

use super::file::Kept;
use super::{Cache, PART_ENDING, PART_PREFIX, Reservation, file, remove};
use crate::net::{RetryOptions, SourceError};
use crate::open_files::retry;
use crate::regular_file;
use crate::shard::ShardUrl;
use crate::source::Reader;
use crate::source::remote::{ObjectVersion, Remote, RemoteReader};

const CHUNK_BYTES: usize = 256 << 10;
/// Fetched chunks that wait for the disk, for each shard.
const WAITING_CHUNKS: usize = 16;

/// Opens a shard from the cache if the server has no newer version; else from the server, and caches
/// it.
pub(crate) async fn open_shard(
    cache: &Arc<Cache>,
    url: &ShardUrl,
    remote: Remote,
    options: RetryOptions,
) -> Result<Reader, SourceError> {
    let name = Cache::name(remote.endpoint(), url);
    // Opened before the request: an eviction from now on does no harm.
    let kept = look_up(cache, &name).await;
    let known = kept.as_ref().map(|(_, kept)| &kept.object);
    let opened = RemoteReader::open_unless(url, remote.clone(), options, known).await?;
    Ok(match (opened, kept) {
        (Some(reader), _) => {
            cache.count_miss();
            let keeper = Keeper::start(cache, &name, url, &reader);
            Reader::Caching(Box::new(CachingReader { reader, keeper }))
        }
        (None, Some((file, kept))) => {
            cache.count_hit();
            // The time of last use. A failure changes only the order of eviction.
            file.set_modified(SystemTime::now()).ok();
            Reader::Cached(Box::new(CachedReader {
                cache: Arc::clone(cache),
                name,
                url: url.clone(),
                remote,
                options,
                rest: Rest::Disk(tokio::fs::File::from_std(file)),
                hash: Sha256::new(),
                kept,
                offset: 0,
            }))
        }
        // Without a known version the server always sends the object.
        (None, None) => {
            return Err(SourceError::Refused {
                url: url.to_string(),
                cause: "the server sent nothing".to_owned(),
            });
        }
    })
}

async fn look_up(cache: &Arc<Cache>, name: &str) -> Option<(File, Kept)> {
    let (cache, path) = (Arc::clone(cache), cache.path(name));
    let look = move || -> io::Result<Option<(File, Kept)>> {
        let mut file = match regular_file::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match file::unseal(&mut file)? {
            Some(kept) => Ok(Some((file, kept))),
            // Truncated by a crash of the machine.
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

/// A shard being read from disk. If the disk fails, the rest comes from the server. Bytes that are not those that were written are an
/// error: by then they were used.
#[derive(Debug)]
pub(crate) struct CachedReader {
    cache: Arc<Cache>,
    name: String,
    url: ShardUrl,
    remote: Remote,
    options: RetryOptions,
    rest: Rest,
    /// Hash of the bytes read from the disk.
    hash: Sha256,
    kept: Kept,
    offset: u64,
}

#[derive(Debug)]
enum Rest {
    Disk(tokio::fs::File),
    Server(Box<RemoteReader>),
}

impl CachedReader {
    pub(crate) fn size(&self) -> u64 {
        self.kept.object.size
    }

    pub(crate) fn version(&self) -> Option<&str> {
        self.kept.object.version.as_deref()
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let file = match &mut self.rest {
            Rest::Disk(file) => file,
            Rest::Server(reader) => return reader.next().await,
        };
        let left = self.kept.object.size - self.offset;
        if left == 0 {
            return self.check().map(|()| None);
        }
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        let cause = match file.take(left).read_buf(&mut chunk).await {
            Ok(0) => "it ends too early".to_owned(),
            Ok(read) => {
                self.offset += read as u64;
                self.hash.update(&chunk);
                return Ok(Some(chunk.freeze()));
            }
            Err(error) => error.to_string(),
        };
        self.switch_to_server(&cause).await?;
        match &mut self.rest {
            Rest::Server(reader) => reader.next().await,
            Rest::Disk(_) => Ok(None),
        }
    }

    /// Compares the bytes that were read with those that were written. Removes a file that differs.
    fn check(&self) -> Result<(), SourceError> {
        let found = format!("{:x}", self.hash.clone().finalize());
        if self
            .kept
            .sha256
            .as_ref()
            .is_none_or(|sha256| *sha256 == found)
        {
            return Ok(());
        }
        let path = self.cache.path(&self.name);
        if let Err(error) = remove(&path) {
            self.cache.turn_off(&error);
        }
        Err(SourceError::File {
            url: self.url.to_string(),
            cause: format!(
                "its copy in data.cache_dir, {}, was damaged or changed, and is removed; start again, from a checkpoint of before this \
                 epoch if there is one",
                path.display()
            ),
        })
    }

    async fn switch_to_server(&mut self, cause: &str) -> Result<(), SourceError> {
        let path = self.cache.path(&self.name);
        tracing::warn!(
            shard = %self.url.to_string(),
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
            &self.kept.object,
            self.offset,
        );
        self.rest = Rest::Server(Box::new(reader.await?));
        Ok(())
    }
}

/// A shard being read from the server and written to the cache.
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
    /// The shard is complete. Without this message the file is discarded.
    End,
}

/// The channel to the task that writes a shard to disk. The task ends with it, and reports its errors.
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
            if !cache.warned.nameless.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    shard = %url.to_string(),
                    "the server says neither version nor length of its shards: they can't be kept in data.cache_dir"
                );
            }
            return None;
        }
        let reservation = cache.reserve(name, size.unwrap_or(0))?;
        let (sender, messages) = bounded(WAITING_CHUNKS);
        let writing = Writing {
            reservation,
            url: url.to_string(),
            version,
            messages,
        };
        // The task blocks on the channel and on the disk. The runtime waits for it when it shuts down.
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
        cache.evict()?;
        let mut part = retry(|| {
            tempfile::Builder::new()
                .prefix(PART_PREFIX)
                .suffix(&format!(".{PART_ENDING}"))
                .tempfile_in(&cache.options.folder)
        })?;
        let (mut size, mut hash) = (0, Sha256::new());
        loop {
            match self.messages.recv_blocking() {
                Ok(Message::Data(chunk)) => {
                    size += chunk.len() as u64;
                    if size > cache.options.limit_bytes {
                        return Ok(());
                    }
                    hash.update(&chunk);
                    part.write_all(&chunk)?;
                }
                Ok(Message::End) => break,
                Err(_not_whole) => return Ok(()),
            }
        }
        let kept = Kept {
            object: ObjectVersion {
                version: self.version,
                size,
            },
            sha256: Some(format!("{:x}", hash.finalize())),
        };
        file::seal(&mut part, &self.url, &kept)?;
        // The content must be on disk before the name is.
        part.as_file().sync_data()?;
        match part.persist(cache.path(&self.reservation.name)) {
            Ok(_file) => {}
            // Another process removed the file as a leftover after a day without progress.
            Err(failed) if failed.error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(failed) => return Err(failed.error),
        }
        let cache = Arc::clone(cache);
        drop(self.reservation);
        cache.evict()
    }
}
