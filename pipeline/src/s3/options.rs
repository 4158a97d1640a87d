//! Access to S3: server, credentials, limits.

use std::path::PathBuf;
use std::time::Duration;

/// Access to S3. The AWS default chain (environment, profile, web identity, instance metadata)
/// decides about unset fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Options {
    /// A server other than AWS: `https://host:port`.
    pub endpoint_url: Option<String>,
    /// Region of the buckets.
    pub region: Option<String>,
    /// Put the bucket into the path and not into the host name. Many S3-compatible servers need it.
    pub path_style: bool,
    /// Send requests unsigned: for public buckets.
    pub anonymous: bool,
    /// Agree to pay for requests, where a bucket asks for that.
    pub requester_pays: bool,
    /// Most requests that may fail within one stretch of a shard; at least 1. Another MiB read refills
    /// the budget, so that passing faults don't end a long shard.
    pub max_attempts: u32,
    /// A PEM file of authorities to trust besides the system's, for S3 and for `https://` shards; if
    /// unset, the file that `AWS_CA_BUNDLE` names.
    pub ca_bundle: Option<PathBuf>,
    /// Longest silence of a server before a request is repeated. Less than 1 KiB/s over twice
    /// this time counts as silence. Only the time spent waiting for the server counts, never a slow
    /// consumer.
    pub stall_timeout: Duration,
    /// Serve this folder's subfolders as buckets from a server inside the process, and use that server.
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
