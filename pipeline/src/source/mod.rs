//! Where bytes come from: S3, HTTP, local files, standard input, and an S3 server inside the process.
//!
//! Owns clients, credentials, retries, listing and the cache of shards. A shard is read as a stream of chunks, from its
//! first byte to its last; whatever happens on the way, what is delivered is one version of the
//! object, whole and in order. Nothing here knows what the bytes mean.

mod cache;
#[cfg(feature = "embedded-s3")]
mod embedded;
mod error;
mod http;
mod lists;
mod local;
mod options;
mod remote;
pub(crate) mod retry;
pub(crate) mod s3;
mod stdin;
mod tls;

pub use cache::CacheCounts;
pub use error::SourceError;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use http::content_range;
pub use options::{CacheOptions, S3Options, SourceOptions};

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::OnceCell;

use crate::flow::FlowMetrics;
use crate::shard::Location;
use crate::shard::ShardUrl;

use cache::{Cache, CachedReader, CachingReader};
use remote::{Remote, RemoteReader};
use retry::{Met, RetryOptions};
use stdin::StdinReader;
use tls::CaBundle;

/// An object as a listing of its bucket shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectInfo {
    /// The object.
    pub url: ShardUrl,
    /// Its name below the folder that was listed.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// What names this version of it, where the listing says so; as [`ObjectReader::etag`].
    pub etag: Option<String>,
    /// When it was written, where the listing says so: seconds since 1970.
    pub modified: Option<f64>,
}

/// Every place shards can come from. Cloning is cheap and shares connections.
#[derive(Clone)]
pub struct Sources(Arc<Inner>);

struct Inner {
    options: S3Options,
    metrics: FlowMetrics,
    // Made on first use: finding credentials takes time that a run on local files needn't spend.
    s3: OnceCell<Arc<s3::S3>>,
    http: OnceCell<reqwest::Client>,
    cache: Option<Arc<Cache>>,
    stdin_taken: AtomicBool,
    http_met: Met,
    #[cfg(feature = "embedded-s3")]
    embedded: Option<embedded::EmbeddedS3>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources")
            .field("options", &self.0.options)
            .finish_non_exhaustive()
    }
}

impl Sources {
    /// Sets the sources up; starts the embedded server and makes the cache's folder if they are asked
    /// for. Touches no network.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] if the embedded server can't start.
    pub async fn new(
        options: impl Into<SourceOptions>,
        metrics: FlowMetrics,
    ) -> Result<Self, SourceError> {
        let SourceOptions { s3: options, cache } = options.into();
        #[cfg(feature = "embedded-s3")]
        let embedded = match &options.embedded_root {
            Some(root) => Some(embedded::EmbeddedS3::start(root).await?),
            None => None,
        };
        #[cfg(not(feature = "embedded-s3"))]
        if let Some(root) = &options.embedded_root {
            return Err(SourceError::Embedded {
                root: root.clone(),
                cause: "this binary was built without the feature embedded-s3".to_owned(),
            });
        }
        Ok(Self(Arc::new(Inner {
            options,
            metrics,
            s3: OnceCell::new(),
            http: OnceCell::new(),
            cache: cache.map(|options| Arc::new(Cache::open(options))),
            stdin_taken: AtomicBool::new(false),
            http_met: Met::default(),
            #[cfg(feature = "embedded-s3")]
            embedded,
        })))
    }

    pub(crate) async fn s3(&self) -> Result<Arc<s3::S3>, SourceError> {
        let inner = &self.0;
        #[cfg(feature = "embedded-s3")]
        let embedded = inner.embedded.as_ref().map(embedded::EmbeddedS3::endpoint);
        #[cfg(not(feature = "embedded-s3"))]
        let embedded: Option<&str> = None;
        let connect = || async {
            let ca_bundle = CaBundle::load(inner.options.ca_bundle.as_deref())?;
            let metrics = inner.metrics.clone();
            let s3 = s3::S3::connect(&inner.options, embedded, ca_bundle, metrics).await;
            Ok::<_, SourceError>(Arc::new(s3))
        };
        inner.s3.get_or_try_init(connect).await.cloned()
    }

    async fn http(&self) -> Result<reqwest::Client, SourceError> {
        self.0
            .http
            .get_or_try_init(|| async {
                let ca_bundle = CaBundle::load(self.0.options.ca_bundle.as_deref())?;
                http::client(ca_bundle.as_ref())
            })
            .await
            .cloned()
    }

    pub(crate) fn retry_options(&self) -> RetryOptions {
        RetryOptions {
            max_attempts: self.0.options.max_attempts.max(1),
            stall_timeout: self.0.options.stall_timeout,
            first_delay: retry::FIRST_DELAY,
        }
    }

    /// Replaces every folder by the shards in it (`.tar`, `.tar.gz`, `.tgz`), sorted; other URLs stay as
    /// they are.
    ///
    /// # Errors
    /// [`SourceError::EmptyFolder`] for a folder without shards, else what kept it from being listed.
    pub async fn list(&self, urls: &[ShardUrl]) -> Result<Vec<ShardUrl>, SourceError> {
        let mut all = Vec::with_capacity(urls.len());
        for url in urls {
            if !url.is_folder() {
                all.push(url.clone());
                continue;
            }
            let mut found = match url.location() {
                Location::S3 { bucket, key } => {
                    let s3 = self.s3().await?;
                    let objects = s3.objects(url, bucket, key, self.retry_options()).await?;
                    objects
                        .into_iter()
                        .map(|object| object.url)
                        .filter(ShardUrl::is_shard)
                        .collect()
                }
                Location::File(path) => local::list(url, path).await?,
                Location::Http(_) | Location::Stdin => {
                    return Err(SourceError::Unsupported {
                        url: url.redacted(),
                        cause: "folders can't be listed over HTTP; name the shards, as https://host/{0..9}.tar".to_owned(),
                    });
                }
            };
            if found.is_empty() {
                return Err(SourceError::EmptyFolder {
                    url: url.redacted(),
                });
            }
            found.sort();
            all.append(&mut found);
        }
        Ok(all)
    }

    pub(crate) fn metrics(&self) -> &FlowMetrics {
        &self.0.metrics
    }

    /// How S3 is reached.
    #[must_use]
    pub fn options(&self) -> &S3Options {
        &self.0.options
    }

    /// Every object under a prefix of a bucket, `s3://bucket/prefix/`, in the listing's order.
    ///
    /// # Errors
    /// [`SourceError::Unsupported`] for anything else than such a prefix, else what kept it from being listed.
    pub async fn objects(&self, folder: &ShardUrl) -> Result<Vec<ObjectInfo>, SourceError> {
        match folder.location() {
            Location::S3 { bucket, key } if folder.is_folder() => {
                let s3 = self.s3().await?;
                s3.objects(folder, bucket, key, self.retry_options()).await
            }
            _ => Err(SourceError::Unsupported {
                url: folder.redacted(),
                cause: "is no prefix in S3; the form is s3://bucket/prefix/".to_owned(),
            }),
        }
    }

    /// Opens an object for reading from its first byte.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be read; faults that may pass have been retried.
    pub async fn open(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        self.claim(url)?;
        self.open_claimed(url).await
    }

    /// Standard input goes to the first who asks for it. A stream asks before it reads, in its order.
    pub(crate) fn claim(&self, url: &ShardUrl) -> Result<(), SourceError> {
        match url.location() {
            Location::Stdin if self.0.stdin_taken.swap(true, Ordering::SeqCst) => {
                Err(SourceError::StdinAgain)
            }
            _ => Ok(()),
        }
    }

    async fn open_claimed(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        let remote = match self.place(url).await? {
            Place::Here(reader) => return Ok(ObjectReader(reader)),
            Place::Remote(remote) => remote,
        };
        let (options, metrics) = (self.retry_options(), self.0.metrics.clone());
        let reader = RemoteReader::open(url, remote, options, metrics).await?;
        Ok(ObjectReader(Reader::Remote(Box::new(reader))))
    }

    /// Opens a shard that was claimed, out of the cache or into it if there is one.
    pub(crate) async fn open_shard(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        let Some(cache) = &self.0.cache else {
            return self.open_claimed(url).await;
        };
        let remote = match self.place(url).await? {
            Place::Here(reader) => return Ok(ObjectReader(reader)),
            Place::Remote(remote) => remote,
        };
        let (options, metrics) = (self.retry_options(), self.0.metrics.clone());
        cache::open_shard(cache, url, remote, options, metrics)
            .await
            .map(ObjectReader)
    }

    /// What was read out of the cache; `None` without one.
    #[must_use]
    pub fn cache_counts(&self) -> Option<CacheCounts> {
        self.0.cache.as_ref().map(|cache| cache.counts())
    }

    async fn place(&self, url: &ShardUrl) -> Result<Place, SourceError> {
        Ok(match url.location() {
            Location::File(path) => {
                Place::Here(Reader::Local(local::LocalReader::open(url, path).await?))
            }
            Location::Stdin => Place::Here(Reader::Stdin(StdinReader::start(std::io::stdin())?)),
            Location::S3 { bucket, key } => Place::Remote(Remote::S3 {
                s3: self.s3().await?,
                bucket: bucket.clone(),
                key: key.clone(),
            }),
            Location::Http(address) => Place::Remote(Remote::Http {
                client: self.http().await?,
                address: address.clone(),
                met: self.0.http_met.clone(),
            }),
        })
    }
}

/// A reader of what is on this machine, or whom to ask.
enum Place {
    Here(Reader),
    Remote(Remote),
}

/// An object being read.
#[derive(Debug)]
pub struct ObjectReader(Reader);

#[derive(Debug)]
enum Reader {
    Local(local::LocalReader),
    Stdin(StdinReader),
    Remote(Box<RemoteReader>),
    Cached(Box<CachedReader>),
    Caching(Box<CachingReader>),
}

impl ObjectReader {
    /// The object's size in bytes, where the server says it.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        match &self.0 {
            Reader::Local(reader) => Some(reader.size()),
            Reader::Stdin(_) => None,
            Reader::Remote(reader) => reader.size(),
            Reader::Cached(reader) => Some(reader.size()),
            Reader::Caching(reader) => reader.size(),
        }
    }

    /// What names this version of the object, where the server says it.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        match &self.0 {
            Reader::Local(_) | Reader::Stdin(_) => None,
            Reader::Remote(reader) => reader.version(),
            Reader::Cached(reader) => reader.version(),
            Reader::Caching(reader) => reader.version(),
        }
    }

    /// The next bytes, in order; `None` after the last.
    ///
    /// # Errors
    /// [`SourceError`] if the object can't be read further; nothing more comes after that.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match &mut self.0 {
            Reader::Local(reader) => reader.next().await,
            Reader::Stdin(reader) => reader.next().await,
            Reader::Remote(reader) => reader.next().await,
            Reader::Cached(reader) => reader.next().await,
            Reader::Caching(reader) => reader.next().await,
        }
    }
}
