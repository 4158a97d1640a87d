//! Options of the sources and of the cache.

use std::path::PathBuf;

use crate::s3::S3Options;

/// Options of [`Sources`](super::Sources). `into()` makes them of [`S3Options`] alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// Access to S3.
    pub s3: S3Options,
    /// Keep remote shards on local disk; `None`: no cache.
    pub cache: Option<CacheOptions>,
}

impl From<S3Options> for SourceOptions {
    fn from(s3: S3Options) -> Self {
        Self { s3, cache: None }
    }
}

/// A folder that keeps shards from S3 and HTTP for the next read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOptions {
    /// The folder. Any number of processes may share it.
    pub folder: PathBuf,
    /// Capacity. Bytes.
    pub limit_bytes: u64,
}
