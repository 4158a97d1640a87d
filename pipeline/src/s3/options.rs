//! Access to S3: server, credentials, limits.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Access to S3. The AWS default chain (environment, profile, web identity, instance metadata) decides
/// about unset fields.
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
    /// Longest silence of a server before a request is repeated. A server that sends
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
