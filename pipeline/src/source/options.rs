//! How places are reached, and what is kept of them.

use std::path::PathBuf;
use std::time::Duration;

/// Everything that [`Sources`](super::Sources) can be told. [`S3Options`] alone are turned into these
/// by `into()`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// How to reach S3.
    pub s3: S3Options,
    /// Keep remote shards on local disk; `None`: don't.
    pub cache: Option<CacheOptions>,
}

impl From<S3Options> for SourceOptions {
    fn from(s3: S3Options) -> Self {
        Self { s3, cache: None }
    }
}

/// A folder in which shards from S3 and HTTP are kept for the next time they are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOptions {
    /// The folder. Any number of processes may share it.
    pub folder: PathBuf,
    /// Most that it may hold. Bytes.
    pub limit_bytes: u64,
}

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
    /// A PEM file of authorities to trust besides the system's, for S3 and for `https://` shards; unset:
    /// the file that `AWS_CA_BUNDLE` names, if any.
    pub ca_bundle: Option<PathBuf>,
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
            ca_bundle: None,
            stall_timeout: Duration::from_secs(30),
            embedded_root: None,
        }
    }
}
