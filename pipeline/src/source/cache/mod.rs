//! The cache of remote shards on local disk.
//!
//! A shard is cached whole or not at all: it is streamed to a temporary file, which is renamed after its
//! last byte. Before a cached shard is used, one conditional request asks the server for a newer
//! version. The least recently used shard is evicted first. If the folder has a fault, shards are
//! streamed; only bytes that were changed on the disk end a run, because they were used before they could be found.
//!
//! Any number of processes may share a folder. They never wait for each other: a rename replaces a
//! shard at once, and a removed shard stays readable for processes that have it open.

mod file;
mod reader;

pub(crate) use reader::{CachedReader, CachingReader, open_shard};

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use metrics::counter;
use sha2::{Digest, Sha256};

use super::options::CacheOptions;
use crate::metrics::{CACHE_HITS, CACHE_MISSES};
use crate::open_files::retry;
use crate::shard::ShardUrl;

const SHARD_ENDING: &str = "shard";
const PART_PREFIX: &str = "coffey-";
const PART_ENDING: &str = "part";
/// Age of a temporary file that counts as left over from a dead process.
const LEFT_OVER_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Shards found in the cache, and not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct CacheCounts {
    /// Shards read from disk.
    pub hits: u64,
    /// Shards that had to be fetched.
    pub misses: u64,
}

/// Warnings that were given already; each is given once.
#[derive(Debug, Default)]
struct Warned {
    off: AtomicBool,
    too_large: AtomicBool,
    nameless: AtomicBool,
}

/// A folder of shards.
#[derive(Debug)]
pub(crate) struct Cache {
    options: CacheOptions,
    hits: AtomicU64,
    misses: AtomicU64,
    /// Shards that this process is writing, and the bytes reserved for each.
    writing: Mutex<BTreeMap<String, u64>>,
    warned: Warned,
}

impl Cache {
    /// Creates the folder if needed, and removes old temporary files.
    pub(crate) fn open(options: CacheOptions) -> Self {
        let cache = Self {
            options,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            writing: Mutex::default(),
            warned: Warned::default(),
        };
        let folder = &cache.options.folder;
        let prepared = std::fs::create_dir_all(folder).and_then(|()| remove_leftovers(folder));
        if let Err(error) = prepared {
            cache.turn_off(&error);
        }
        cache
    }

    fn count_hit(&self) {
        counter!(CACHE_HITS).increment(1);
        self.hits.fetch_add(1, Ordering::Relaxed);
    }

    fn count_miss(&self) {
        counter!(CACHE_MISSES).increment(1);
        self.misses.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> CacheCounts {
        CacheCounts {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }

    /// Stops writing for good: a folder that failed once would fail with each shard.
    fn turn_off(&self, cause: &dyn Display) {
        if !self.warned.off.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                folder = %self.options.folder.display(),
                %cause,
                "no more shards are kept in data.cache_dir; they are streamed"
            );
        }
    }

    fn is_off(&self) -> bool {
        self.warned.off.load(Ordering::Relaxed)
    }

    /// The file name of a server's object.
    fn name(server: &str, url: &ShardUrl) -> String {
        let digest = Sha256::digest(format!("{server}\n{}", url.identity()));
        digest[..20]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.options.folder.join(format!("{name}.{SHARD_ENDING}"))
    }

    fn writing(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves space for a shard of `size` bytes (0 if unknown); `None` if the shard is not to be cached.
    fn reserve(self: &Arc<Self>, name: &str, size: u64) -> Option<Reservation> {
        if self.is_off() {
            return None;
        }
        let limit = self.options.limit_bytes;
        if size > limit {
            if !self.warned.too_large.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    size,
                    limit,
                    "a shard is larger than the whole cache: it is not kept"
                );
            }
            return None;
        }
        let mut writing = self.writing();
        let others: u64 = writing.values().sum();
        if writing.contains_key(name) || others.saturating_add(size) > limit {
            return None;
        }
        writing.insert(name.to_owned(), size);
        Some(Reservation {
            cache: Arc::clone(self),
            name: name.to_owned(),
        })
    }

    /// Evicts the least recently used shards until the cached and the reserved bytes fit.
    fn evict(&self) -> io::Result<()> {
        let reserved: u64 = self.writing().values().sum();
        let room = self.options.limit_bytes.saturating_sub(reserved);
        let mut kept = list(&self.options.folder, SHARD_ENDING)?;
        kept.sort();
        let mut bytes: u64 = kept.iter().map(|kept| kept.size).sum();
        for oldest in kept {
            if bytes <= room {
                break;
            }
            remove(&oldest.path)?;
            bytes -= oldest.size;
        }
        Ok(())
    }
}

/// Space for a shard that is being written; released on drop.
#[derive(Debug)]
struct Reservation {
    cache: Arc<Cache>,
    name: String,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.cache.writing().remove(&self.name);
    }
}

/// A file of the cache; the least recently used sorts first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct CachedFile {
    used: SystemTime,
    path: PathBuf,
    size: u64,
}

fn list(folder: &Path, ending: &str) -> io::Result<Vec<CachedFile>> {
    let mut found = Vec::new();
    for entry in retry(|| std::fs::read_dir(folder))? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != ending) {
            continue;
        }
        let about = entry
            .metadata()
            .and_then(|metadata| Ok((metadata.modified()?, metadata.len())));
        match about {
            Ok((used, size)) => found.push(CachedFile { used, path, size }),
            // Another process removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_leftovers(folder: &Path) -> io::Result<()> {
    let now = SystemTime::now();
    for part in list(folder, PART_ENDING)? {
        let is_ours = part
            .path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(PART_PREFIX));
        let age = now.duration_since(part.used).unwrap_or_default();
        if is_ours && age > LEFT_OVER_AFTER {
            remove(&part.path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path, limit_bytes: u64) -> Arc<Cache> {
        Arc::new(Cache::open(CacheOptions {
            folder: folder.to_owned(),
            limit_bytes,
        }))
    }

    fn put(folder: &Path, name: &str, size: usize, age: Duration) {
        let path = folder.join(name);
        std::fs::write(&path, vec![0; size]).unwrap();
        let file = std::fs::File::options().append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn cache_removes_old_temporary_files() {
        let folder = tempfile::tempdir().unwrap();
        let (hour, days) = (Duration::from_secs(3600), Duration::from_secs(3 * 86_400));
        put(folder.path(), "coffey-a.part", 9, days);
        put(folder.path(), "coffey-b.part", 9, hour);
        put(folder.path(), "notes.part", 9, days);
        put(folder.path(), "c.shard", 9, days);
        cache(folder.path(), 100);
        assert_eq!(
            names(folder.path()),
            ["c.shard", "coffey-b.part", "notes.part"]
        );
    }

    #[test]
    fn cache_evicts_least_recently_used_first() {
        let folder = tempfile::tempdir().unwrap();
        let minutes = |n: u64| Duration::from_secs(60 * n);
        put(folder.path(), "a.shard", 40, minutes(1));
        put(folder.path(), "b.shard", 40, minutes(3));
        put(folder.path(), "c.shard", 40, minutes(2));
        let cache = cache(folder.path(), 100);
        cache.evict().unwrap();
        assert_eq!(names(folder.path()), ["a.shard", "c.shard"]);
        let room = cache.reserve("d", 30).unwrap();
        cache.evict().unwrap();
        assert_eq!(names(folder.path()), ["a.shard"]);
        drop(room);
        assert!(cache.writing().is_empty());
    }

    #[test]
    fn cache_reserves_within_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 100);
        assert!(cache.reserve("large", 101).is_none());
        let one = cache.reserve("one", 60).unwrap();
        assert!(cache.reserve("one", 1).is_none(), "it is being written");
        assert!(cache.reserve("two", 60).is_none(), "both don't fit");
        drop(one);
        assert!(cache.reserve("two", 60).is_some());
    }

    #[test]
    fn cache_names_differ_by_server_and_query() {
        let url = |text: &str| text.parse::<ShardUrl>().unwrap();
        let name = Cache::name("", &url("https://h/a?x=1"));
        assert_ne!(name, Cache::name("", &url("https://h/a?x=2")));
        let name = Cache::name("AWS S3", &url("s3://b/k"));
        assert_ne!(name, Cache::name("https://minio", &url("s3://b/k")));
        assert_eq!(name.len(), 40);
    }
}
