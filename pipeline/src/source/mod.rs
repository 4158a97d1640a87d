//! Reading: from S3, HTTP, local files, standard input, and an S3 server inside the process.
//!
//! Owns the readers, the lists of shards and the cache. A shard is read as a stream of chunks, from the
//! first byte to the last: one version of the object, whole and in order, whatever faults occur on the
//! way. The room never interprets the bytes.

mod cache;
#[cfg(feature = "embedded-s3")]
mod embedded;
mod headers;
mod http;
mod hub;
mod images;
mod lists;
mod local;
mod lookup;
mod options;
mod remote;
mod stdin;

pub use cache::CacheCounts;
pub use headers::HttpHeader;
pub use lists::ShardList;
pub use lookup::LookUp;
pub use options::{CacheOptions, HubOptions, SourceOptions};

pub use crate::image_folder::MemberKeys;
pub use crate::net::{Details, S3Counts, ServerRecord, SourceError};
pub use crate::s3::{ObjectInfo, S3Options};

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::OnceCell;

use crate::bounded::BoundedBytes;
use crate::image_folder::ImageFolder;
use crate::net::{CaBundle, FIRST_DELAY, RetryOptions};
use crate::s3::S3;
use crate::shard::Location;
use crate::shard::{HttpUrl, ShardUrl};

use cache::{Cache, CachedReader, CachingReader};
use headers::ServerHeaders;
use http::HttpClient;
use images::ImagesReader;
use remote::{Remote, RemoteReader};
use stdin::StdinReader;

/// Access to every kind of place that holds shards. Cloning is cheap and shares connections.
#[derive(Clone)]
pub struct Sources(Arc<Inner>);

struct Inner {
    options: S3Options,
    // Made on first use: a run on local files need not wait for credentials.
    s3: OnceCell<Arc<S3>>,
    http: OnceCell<HttpClient>,
    http_headers: Vec<HttpHeader>,
    hub: HubOptions,
    members: MemberKeys,
    image_folders: Mutex<BTreeMap<PathBuf, Arc<ImageFolder>>>,
    cache: Option<Arc<Cache>>,
    stdin_taken: AtomicBool,
    s3_server: ServerRecord,
    http_servers: ServerRecord,
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
    /// Sets up the sources; starts the embedded server and creates the cache's folder if configured.
    /// Touches no network.
    ///
    /// # Errors
    /// [`SourceError::Embedded`] if the embedded server can't start.
    pub async fn new(options: impl Into<SourceOptions>) -> Result<Self, SourceError> {
        let SourceOptions {
            s3: options,
            cache,
            http_headers,
            hub,
            members,
        } = options.into();
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
            s3: OnceCell::new(),
            http: OnceCell::new(),
            http_headers,
            hub,
            members,
            image_folders: Mutex::default(),
            cache: cache.map(|options| Arc::new(Cache::open(options))),
            stdin_taken: AtomicBool::new(false),
            s3_server: ServerRecord::s3(),
            http_servers: ServerRecord::http(),
            #[cfg(feature = "embedded-s3")]
            embedded,
        })))
    }

    pub(crate) async fn s3(&self) -> Result<Arc<S3>, SourceError> {
        let inner = &self.0;
        #[cfg(feature = "embedded-s3")]
        let embedded = inner.embedded.as_ref().map(embedded::EmbeddedS3::endpoint);
        #[cfg(not(feature = "embedded-s3"))]
        let embedded: Option<&str> = None;
        let connect = || async {
            let ca_bundle = CaBundle::load(inner.options.ca_bundle.as_deref())?;
            let server = inner.s3_server.clone();
            let s3 = S3::connect(&inner.options, embedded, ca_bundle, server).await;
            Ok::<_, SourceError>(Arc::new(s3))
        };
        inner.s3.get_or_try_init(connect).await.cloned()
    }

    async fn http(&self) -> Result<HttpClient, SourceError> {
        self.0
            .http
            .get_or_try_init(|| async {
                let ca_bundle = CaBundle::load(self.0.options.ca_bundle.as_deref())?;
                let headers = ServerHeaders::new(&self.0.http_headers, &self.0.hub)?;
                HttpClient::new(ca_bundle.as_ref(), headers)
            })
            .await
            .cloned()
    }

    pub(crate) fn retry_options(&self) -> RetryOptions {
        RetryOptions {
            max_attempts: self.0.options.max_attempts.max(1),
            stall_timeout: self.0.options.stall_timeout,
            first_delay: FIRST_DELAY,
        }
    }

    /// Replaces each folder by the shards in it (`.tar`, `.tar.gz`, `.tgz`), sorted, and a local folder of images by
    /// shards that are made of them; other URLs stay as they are.
    ///
    /// # Errors
    /// [`SourceError::EmptyFolder`] for a folder without shards and images, else the error of the listing.
    pub async fn list(&self, urls: &[ShardUrl]) -> Result<Vec<ShardUrl>, SourceError> {
        Ok(self.list_folders(urls.to_vec()).await?.shards)
    }

    /// The shards in a folder, sorted.
    async fn list_folder(&self, url: &ShardUrl) -> Result<Vec<ShardUrl>, SourceError> {
        let files: Vec<ShardUrl> = match url.location() {
            Location::S3 { bucket, key } => {
                let s3 = self.s3().await?;
                let objects = s3.objects(url, bucket, key, self.retry_options()).await?;
                objects.into_iter().map(|object| object.url).collect()
            }
            Location::Hub(folder) => self.list_hub(url, folder).await?,
            Location::File(path) => local::list(url, path).await?,
            Location::Http(_) | Location::Images(_) | Location::Stdin => {
                return Err(SourceError::Unsupported {
                    url: url.to_string(),
                    cause: "folders can't be listed over HTTP; name the shards, as https://host/{0..9}.tar".to_owned(),
                });
            }
        };
        let (mut shards, others): (Vec<_>, Vec<_>) =
            files.into_iter().partition(ShardUrl::is_shard);
        let images = self.images_among(&others);
        match (url.location(), images) {
            (Location::File(path), _) if shards.is_empty() => {
                return self.images_in(url, path, None).await;
            }
            (Location::File(_), Some(images)) => {
                tracing::warn!(
                    "{}: only its shards are read, not {images}",
                    url.to_string()
                );
            }
            (_, images) if shards.is_empty() => {
                let (url, remedy) = (
                    url.to_string(),
                    "make shards of a local copy with `coffey pack FOLDER --out",
                );
                let found = images.map(|images| format!(", but {images}: {remedy} {url}`"));
                let found = found.unwrap_or_default();
                return Err(SourceError::EmptyFolder { url, found });
            }
            _ => {}
        }
        shards.sort();
        Ok(shards)
    }

    /// The record of the S3 server: counts of requests and retries so far.
    #[must_use]
    pub fn s3_server(&self) -> &ServerRecord {
        &self.0.s3_server
    }

    /// Extensions of the members of samples in folders of images.
    pub(crate) fn members(&self) -> &MemberKeys {
        &self.0.members
    }

    /// The options of the access to S3.
    #[must_use]
    pub fn options(&self) -> &S3Options {
        &self.0.options
    }

    /// Each object under a prefix of a bucket, `s3://bucket/prefix/`, by key.
    ///
    /// # Errors
    /// [`SourceError::Unsupported`] for any other URL, else the error of the listing.
    pub async fn objects(&self, folder: &ShardUrl) -> Result<Vec<ObjectInfo>, SourceError> {
        match folder.location() {
            Location::S3 { bucket, key } if folder.is_folder() => {
                let s3 = self.s3().await?;
                s3.objects(folder, bucket, key, self.retry_options()).await
            }
            _ => Err(SourceError::Unsupported {
                url: folder.to_string(),
                cause: "is no prefix in S3; the form is s3://bucket/prefix/".to_owned(),
            }),
        }
    }

    /// Opens an object for reading from its first byte.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be read; passing faults have been retried.
    pub async fn open(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        self.claim(url)?;
        self.open_claimed(url).await
    }

    /// The size of an object, where it is known before the object is read.
    ///
    /// # Errors
    /// As [`Sources::open`].
    pub async fn size(&self, url: &ShardUrl) -> Result<Option<u64>, SourceError> {
        match url.location() {
            Location::Images(shard) => {
                let folder = self.image_folder(&shard.folder).await?;
                let samples = folder.samples_of(shard)?;
                Ok(Some(folder.tar_bytes(samples)))
            }
            _ => Ok(self.open(url).await?.size()),
        }
    }

    /// Claims standard input for its one reader. A stream claims before it reads, in its order.
    pub(crate) fn claim(&self, url: &ShardUrl) -> Result<(), SourceError> {
        match url.location() {
            Location::Stdin if self.0.stdin_taken.swap(true, Ordering::SeqCst) => {
                Err(SourceError::StdinAgain)
            }
            _ => Ok(()),
        }
    }

    async fn open_claimed(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        let remote = match self.locate(url).await? {
            Located::Local(reader) => return Ok(ObjectReader(reader)),
            Located::Remote(remote) => remote,
        };
        let reader = RemoteReader::open(url, remote, self.retry_options()).await?;
        Ok(ObjectReader(Reader::Remote(Box::new(reader))))
    }

    /// Opens a claimed shard, through the cache if there is one.
    pub(crate) async fn open_shard(&self, url: &ShardUrl) -> Result<ObjectReader, SourceError> {
        let Some(cache) = &self.0.cache else {
            return self.open_claimed(url).await;
        };
        let remote = match self.locate(url).await? {
            Located::Local(reader) => return Ok(ObjectReader(reader)),
            Located::Remote(remote) => remote,
        };
        cache::open_shard(cache, url, remote, self.retry_options())
            .await
            .map(ObjectReader)
    }

    /// Hits and misses of the cache; `None` without one.
    #[must_use]
    pub fn cache_counts(&self) -> Option<CacheCounts> {
        self.0.cache.as_ref().map(|cache| cache.counts())
    }

    async fn locate(&self, url: &ShardUrl) -> Result<Located, SourceError> {
        Ok(match url.location() {
            Location::File(path) => {
                Located::Local(Reader::Local(local::LocalReader::open(url, path).await?))
            }
            Location::Images(shard) => {
                let folder = self.image_folder(&shard.folder).await?;
                Located::Local(Reader::Images(ImagesReader::start(folder, shard)?))
            }
            Location::Stdin => Located::Local(Reader::Stdin(StdinReader::start(std::io::stdin())?)),
            Location::S3 { bucket, key } => Located::Remote(Remote::S3 {
                s3: self.s3().await?,
                bucket: bucket.clone(),
                key: key.clone(),
            }),
            Location::Http(address) => Located::Remote(Remote::Http {
                client: self.http().await?,
                address: address.clone(),
                hub: String::new(),
                server: self.0.http_servers.clone(),
            }),
            Location::Hub(file) => {
                let hub = self.hub_endpoint(url)?;
                Located::Remote(Remote::Http {
                    client: self.http().await?,
                    address: HttpUrl::new(file.resolve(hub)),
                    hub: hub.to_owned(),
                    server: self.0.http_servers.clone(),
                })
            }
        })
    }
}

/// An object on this machine, opened, or on a server.
enum Located {
    Local(Reader),
    Remote(Remote),
}

/// An object being read.
#[derive(Debug)]
pub struct ObjectReader(Reader);

#[derive(Debug)]
enum Reader {
    Local(local::LocalReader),
    Images(ImagesReader),
    Stdin(StdinReader),
    Remote(Box<RemoteReader>),
    Cached(Box<CachedReader>),
    Caching(Box<CachingReader>),
}

impl ObjectReader {
    /// Whether the reader compares the bytes with a hash at their end.
    pub(crate) fn is_verified(&self) -> bool {
        matches!(self.0, Reader::Cached(_))
    }

    /// The object's size in bytes, where the server gives it.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        match &self.0 {
            Reader::Local(reader) => Some(reader.size()),
            Reader::Images(_) | Reader::Stdin(_) => None,
            Reader::Remote(reader) => reader.size(),
            Reader::Cached(reader) => Some(reader.size()),
            Reader::Caching(reader) => reader.size(),
        }
    }

    /// The version of the object, where the server gives it.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        match &self.0 {
            Reader::Local(_) | Reader::Images(_) | Reader::Stdin(_) => None,
            Reader::Remote(reader) => reader.version(),
            Reader::Cached(reader) => reader.version(),
            Reader::Caching(reader) => reader.version(),
        }
    }

    /// Reads the rest of the object `url`, of at most `most` bytes.
    ///
    /// # Errors
    /// [`SourceError::TooLong`] if there are more, else as [`Self::next`].
    pub async fn read_to_end(&mut self, url: &ShardUrl, most: u64) -> Result<Vec<u8>, SourceError> {
        let too_long = |error| SourceError::TooLong {
            url: url.to_string(),
            what: "the file",
            error,
        };
        let mut content = BoundedBytes::new(most, self.size()).map_err(too_long)?;
        while let Some(chunk) = self.next().await? {
            content.push(&chunk).map_err(too_long)?;
        }
        Ok(content.into_vec())
    }

    /// The next bytes, in order; `None` after the last.
    ///
    /// # Errors
    /// [`SourceError`] if the object can't be read further; nothing more comes after that.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match &mut self.0 {
            Reader::Local(reader) => reader.next().await,
            Reader::Images(reader) => reader.next().await,
            Reader::Stdin(reader) => reader.next().await,
            Reader::Remote(reader) => reader.next().await,
            Reader::Cached(reader) => reader.next().await,
            Reader::Caching(reader) => reader.next().await,
        }
    }
}
