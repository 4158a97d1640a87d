//! Where bytes come from: S3, HTTP, local files, and an S3 server inside the process.
//!
//! Owns clients, credentials, retries and listing. A shard is read as a stream of chunks, from its
//! first byte to its last; whatever happens on the way, what is delivered is one version of the
//! object, whole and in order. Nothing here knows what the bytes mean.

#[cfg(feature = "embedded-s3")]
mod embedded;
mod error;
mod http;
mod local;
mod remote;
mod retry;
mod s3;

pub use error::SourceError;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use http::content_range;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OnceCell;

use crate::flow::FlowMetrics;
use crate::shard::Location;
use crate::shard::ShardUrl;

use remote::{Remote, RemoteReader};
use retry::{Met, RetryOptions};

/// How to reach S3. What is left unset the AWS default chain decides (environment, profile, web
/// identity, instance metadata).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Options {
    /// Another server than AWS: `https://host:port`.
    pub endpoint_url: Option<String>,
    /// Region of the buckets.
    pub region: Option<String>,
    /// Put the bucket into the path and not into the host name, as many S3-compatible servers need.
    pub path_style: bool,
    /// Send requests unsigned: for public buckets.
    pub anonymous: bool,
    /// Agree to pay for requests, where a bucket asks for that.
    pub requester_pays: bool,
    /// Most requests that may fail at one place of a shard; at least 1. Reading another MiB gives
    /// them back, so that a long shard is not ended by faults that each passed.
    pub max_attempts: u32,
    /// How long a server may stay silent before a request is given up and repeated. One that sends
    /// less than 1 KiB/s over twice this time counts as silent. Only waiting for the server counts,
    /// never a slow consumer.
    pub stall_timeout: Duration,
    /// Serve this folder's subfolders as buckets from a server inside the process, and use that.
    pub embedded_root: Option<PathBuf>,
}

impl Default for S3Options {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            path_style: false,
            anonymous: false,
            requester_pays: false,
            max_attempts: 10,
            stall_timeout: Duration::from_secs(30),
            embedded_root: None,
        }
    }
}

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
    /// Sets the sources up; starts the embedded server if one is asked for. Touches no network.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] if the embedded server can't start.
    pub async fn new(options: S3Options, metrics: FlowMetrics) -> Result<Self, SourceError> {
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
            http_met: Met::default(),
            #[cfg(feature = "embedded-s3")]
            embedded,
        })))
    }

    async fn s3(&self) -> Result<Arc<s3::S3>, SourceError> {
        let inner = &self.0;
        #[cfg(feature = "embedded-s3")]
        let embedded = inner.embedded.as_ref().map(embedded::EmbeddedS3::endpoint);
        #[cfg(not(feature = "embedded-s3"))]
        let embedded: Option<&str> = None;
        let connect = || async {
            let s3 = s3::S3::connect(&inner.options, embedded, inner.metrics.clone()).await;
            Ok::<_, SourceError>(Arc::new(s3))
        };
        inner.s3.get_or_try_init(connect).await.cloned()
    }

    async fn http(&self) -> Result<reqwest::Client, SourceError> {
        self.0
            .http
            .get_or_try_init(|| async { http::client() })
            .await
            .cloned()
    }

    fn retry_options(&self) -> RetryOptions {
        RetryOptions {
            max_attempts: self.0.options.max_attempts.max(1),
            stall_timeout: self.0.options.stall_timeout,
            first_delay: retry::FIRST_DELAY,
        }
    }

    /// Replaces every folder by the `.tar` files in it, sorted; other URLs stay as they are.
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
                        .filter(|url| url.name().ends_with(".tar"))
                        .collect()
                }
                Location::File(path) => local::list(url, path).await?,
                Location::Http(_) => {
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
        let remote = match url.location() {
            Location::File(path) => {
                return Ok(ObjectReader(Reader::Local(
                    local::LocalReader::open(url, path).await?,
                )));
            }
            Location::S3 { bucket, key } => Remote::S3 {
                s3: self.s3().await?,
                bucket: bucket.clone(),
                key: key.clone(),
            },
            Location::Http(address) => Remote::Http {
                client: self.http().await?,
                address: address.clone(),
                met: self.0.http_met.clone(),
            },
        };
        let reader =
            RemoteReader::open(url, remote, self.retry_options(), self.0.metrics.clone()).await?;
        Ok(ObjectReader(Reader::Remote(Box::new(reader))))
    }
}

/// An object being read.
#[derive(Debug)]
pub struct ObjectReader(Reader);

#[derive(Debug)]
enum Reader {
    Local(local::LocalReader),
    Remote(Box<RemoteReader>),
}

impl ObjectReader {
    /// The object's size in bytes, where the server says it.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        match &self.0 {
            Reader::Local(reader) => Some(reader.size()),
            Reader::Remote(reader) => reader.size(),
        }
    }

    /// What names this version of the object, where the server says it.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        match &self.0 {
            Reader::Local(_) => None,
            Reader::Remote(reader) => reader.version(),
        }
    }

    /// The next bytes, in order; `None` after the last.
    ///
    /// # Errors
    /// [`SourceError`] if the object can't be read further; nothing more comes after that.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match &mut self.0 {
            Reader::Local(reader) => reader.next().await,
            Reader::Remote(reader) => reader.next().await,
        }
    }
}
