//! Shards as a manifest lists them, and the comparison with what is read.

use std::fmt::Display;

use super::error::StreamError;
use crate::shard::ShardUrl;

/// The entry of a shard in the manifest beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedShard {
    /// Size of the shard.
    pub bytes: u64,
    /// SHA-256 of the shard, hexadecimal.
    pub sha256: String,
    /// Samples in the shard.
    pub samples: u64,
}

impl ListedShard {
    pub(super) fn check_bytes(&self, url: &ShardUrl, found: u64) -> Result<(), StreamError> {
        compare(url, "size in bytes", &found, &self.bytes)
    }

    pub(super) fn check_sha256(&self, url: &ShardUrl, found: &str) -> Result<(), StreamError> {
        compare(url, "SHA-256", &found, &self.sha256.as_str())
    }

    pub(super) fn check_samples(&self, url: &ShardUrl, found: u64) -> Result<(), StreamError> {
        compare(url, "number of samples", &found, &self.samples)
    }
}

fn compare<T: PartialEq + Display>(
    url: &ShardUrl,
    what: &'static str,
    found: &T,
    listed: &T,
) -> Result<(), StreamError> {
    if found == listed {
        return Ok(());
    }
    Err(StreamError::OtherThanManifest {
        url: url.to_string(),
        what,
        found: found.to_string(),
        listed: listed.to_string(),
    })
}
