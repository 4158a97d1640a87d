//! Options of [`Sources`](super::Sources): access to S3, and the cache on disk.

use std::path::PathBuf;

use crate::s3::S3Options;

/// Every option of [`Sources`](super::Sources). `S3Options::into()` makes these without a cache.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// Access to S3.
    pub s3: S3Options,
    /// Local disk cache of remote shards; `None`: no cache.
    pub cache: Option<CacheOptions>,
}

impl From<S3Options> for SourceOptions {
    fn from(s3: S3Options) -> Self {
        Self { s3, cache: None }
    }
}

/// A folder in which shards from S3 and HTTP are kept until they are read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOptions {
    /// The folder. Any number of processes may share it.
    pub folder: PathBuf,
    /// Most bytes it may hold.
    pub limit_bytes: u64,
}
