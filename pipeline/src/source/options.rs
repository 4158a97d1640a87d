//! Options of [`Sources`](super::Sources): access to S3, and the cache on disk.

use std::fmt;
use std::path::PathBuf;

use super::headers::HttpHeader;
use crate::image_folder::MemberKeys;
use crate::s3::S3Options;

/// Every option of [`Sources`](super::Sources). `S3Options::into()` makes these without a cache.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// Access to S3.
    pub s3: S3Options,
    /// Local disk cache of remote shards; `None`: no cache.
    pub cache: Option<CacheOptions>,
    /// Headers of requests for `http(s)://` shards.
    pub http_headers: Vec<HttpHeader>,
    /// The Hugging Face Hub, for `hf://` shards.
    pub hub: HubOptions,
    /// Extensions of the members of samples in folders of images.
    pub members: MemberKeys,
}

impl From<S3Options> for SourceOptions {
    fn from(s3: S3Options) -> Self {
        Self {
            s3,
            ..Self::default()
        }
    }
}

/// Access to files on the Hugging Face Hub. `Debug` does not show the token.
#[derive(Clone, PartialEq, Eq)]
pub struct HubOptions {
    /// URL of the Hub, without a slash at the end; or why it is not known, which is the error of an `hf://` shard.
    pub endpoint: Result<String, String>,
    /// Access token, sent to the endpoint alone.
    pub token: Option<String>,
}

impl Default for HubOptions {
    fn default() -> Self {
        Self {
            endpoint: Ok("https://huggingface.co".to_owned()),
            token: None,
        }
    }
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "REDACTED"))
            .finish()
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
