//! Options of [`Sources`](super::Sources): how S3 is reached, and what is cached on disk.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Every option of [`Sources`](super::Sources). `S3Options::into()` makes these without a cache.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// How to reach S3.
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

/// How S3 is reached. The AWS default chain (environment, profile, web identity, instance metadata) decides what is unset.
///
/// Deserialises from the table `[s3]` of a configuration; every field left out has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct S3Options {
    /// URL of an S3-compatible server, `https://host:port`; AWS when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<String>,
    /// Region of the buckets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// `http://host/bucket/key` in place of `http://bucket.host/key`, as many S3-compatible servers need.
    pub path_style: bool,
    /// Send unsigned requests, for public buckets.
    pub anonymous: bool,
    /// Pay for requests to requester-pays buckets.
    pub requester_pays: bool,
    /// PEM file of authorities trusted besides the system's, for S3 and for `https://` shards; the file
    /// named by `AWS_CA_BUNDLE` when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<PathBuf>,
    /// Most failed requests at one place of a shard before an error; at least 1. Another MiB read
    /// resets the count, so that a long shard is not ended by faults that each passed.
    pub max_attempts: u32,
    /// Serve this folder's subfolders as buckets from a server inside the process, and read from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedded_root: Option<PathBuf>,
    /// How long a server may stay silent before a request is given up and repeated. A server that sends
    /// less than 1 KiB/s over twice this time counts as silent. Only waiting for the server counts,
    /// never a slow consumer. Not a key of `[s3]`.
    #[serde(skip)]
    pub stall_timeout: Duration,
}

impl Default for S3Options {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            path_style: false,
            anonymous: false,
            requester_pays: false,
            ca_bundle: None,
            max_attempts: 10,
            embedded_root: None,
            stall_timeout: Duration::from_secs(30),
        }
    }
}
