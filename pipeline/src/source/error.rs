//! What can go wrong with a source, told so that a user knows what to do.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use crate::shard::UrlError;

/// Why bytes could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// There is no such object, bucket or file.
    #[error("{url}: not found ({cause}); check the name{hint}")]
    NotFound {
        /// What was asked for.
        url: String,
        /// What the server said.
        cause: String,
        /// What else to look at.
        hint: &'static str,
    },
    /// The server refuses.
    #[error("{url}: access denied ({cause}); {hint}")]
    Forbidden {
        /// What was asked for.
        url: String,
        /// What the server said.
        cause: String,
        /// What to set.
        hint: &'static str,
    },
    /// There are no credentials to sign with.
    #[error(
        "{url}: no usable AWS credentials ({cause}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, \
         or [s3] anonymous = true for a public bucket"
    )]
    Credentials {
        /// What was asked for.
        url: String,
        /// Where the chain of providers ended.
        cause: String,
    },
    /// The credentials were good once, and looking them up again gave no newer ones.
    #[error(
        "{url}: the AWS credentials have expired ({cause}), and looking them up again gave no newer ones; get new ones (as with \
         `aws sso login`, or a new AWS_SESSION_TOKEN) and start again, or use a role or profile that renews them by itself"
    )]
    Expired {
        /// What was asked for.
        url: String,
        /// What the server said.
        cause: String,
    },
    /// The server's certificate was not accepted.
    #[error("{url}: the certificate of {endpoint} is not accepted ({cause}){hint}")]
    Certificate {
        /// What was asked for.
        url: String,
        /// Who was called.
        endpoint: String,
        /// What is wrong with it.
        cause: String,
        /// What to set.
        hint: &'static str,
    },
    /// The file of certificates can't be used.
    #[error("{setting} = {path:?}: {cause}")]
    CaBundle {
        /// Where it was named.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// Standard input was wanted a second time.
    #[error(
        "-: standard input can be read once, and this is the second time: a second epoch, data.resample_shards = true, or a \
         shard that is named twice; save it to a file and name that, or stop within the first epoch"
    )]
    StdinAgain,
    /// A shard's URL is wrong.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// A line in a list of shards is wrong.
    #[error("{list}:{line}: {error}")]
    List {
        /// The list.
        list: String,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        error: UrlError,
    },
    /// The bucket lives elsewhere.
    #[error("{url}: the bucket is in another region ({cause}); set [s3] region{}", right.as_ref().map_or(String::new(), |region| format!(" = {region:?}")))]
    WrongRegion {
        /// What was asked for.
        url: String,
        /// What the server said.
        cause: String,
        /// The bucket's region, if the server names it.
        right: Option<String>,
    },
    /// The object was replaced while it was read. Two versions are never spliced.
    #[error(
        "{url}: the object changed while it was read (after {offset} bytes: {cause}); start again when it no longer changes"
    )]
    Changed {
        /// Which object.
        url: String,
        /// Bytes read of the old version.
        offset: u64,
        /// How that was noticed.
        cause: String,
    },
    /// Nobody answers there.
    #[error(
        "{url}: can't connect to {endpoint} ({attempts} attempts): {cause}; check the network{hint}"
    )]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Who was called.
        endpoint: String,
        /// How often.
        attempts: u32,
        /// The last failure.
        cause: String,
        /// What else to look at.
        hint: &'static str,
    },
    /// Faults that may pass did not, within the attempts allowed for a stretch of the object.
    #[error("{url}: gave up after {attempts} attempts in {:.1} s, with {offset} bytes read: {cause}", elapsed.as_secs_f64())]
    Exhausted {
        /// Which object.
        url: String,
        /// Requests that failed since the last progress.
        attempts: u32,
        /// Time since the first of them.
        elapsed: Duration,
        /// Bytes read before the last failure.
        offset: u64,
        /// The last failure.
        cause: String,
    },
    /// Faults that may pass did not, while something was written.
    #[error("{url}: not written, gave up after {attempts} attempts in {:.1} s: {cause}", elapsed.as_secs_f64())]
    NotWritten {
        /// Which object.
        url: String,
        /// Requests that failed.
        attempts: u32,
        /// Time since the first of them.
        elapsed: Duration,
        /// The last failure.
        cause: String,
    },
    /// The server answers with something that repeating won't change.
    #[error("{url}: {cause}")]
    Refused {
        /// What was asked for.
        url: String,
        /// What it said.
        cause: String,
    },
    /// The URL is of a kind that can't do what was asked.
    #[error("{url}: {cause}")]
    Unsupported {
        /// What was asked for.
        url: String,
        /// Why not, and what would be right.
        cause: String,
    },
    /// A folder without shards.
    #[error("{url}: no .tar, .tar.gz or .tgz files in it")]
    EmptyFolder {
        /// Which folder.
        url: String,
    },
    /// A local file can't be read.
    #[error("{url}: {cause}")]
    File {
        /// Which file.
        url: String,
        /// The system's error.
        cause: String,
    },
    /// The embedded server can't start.
    #[error("[s3] embedded_root = {root:?}: {cause}")]
    Embedded {
        /// The folder to be served.
        root: PathBuf,
        /// Why not.
        cause: String,
    },
}

impl SourceError {
    /// Whether the configuration is at fault by itself. What only the other side can know (an object
    /// that isn't there, a credential it does not take) is a failure of the run.
    #[must_use]
    pub fn is_config(&self) -> bool {
        match self {
            Self::Unsupported { .. }
            | Self::Embedded { .. }
            | Self::CaBundle { .. }
            | Self::Url(_)
            | Self::List { .. } => true,
            Self::NotFound { .. }
            | Self::Forbidden { .. }
            | Self::Credentials { .. }
            | Self::Expired { .. }
            | Self::Certificate { .. }
            | Self::StdinAgain
            | Self::WrongRegion { .. }
            | Self::EmptyFolder { .. }
            | Self::Changed { .. }
            | Self::Unreachable { .. }
            | Self::Exhausted { .. }
            | Self::NotWritten { .. }
            | Self::Refused { .. }
            | Self::File { .. } => false,
        }
    }
}

/// An error and its causes on one line, without what only repeats the one before.
pub(crate) fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines.join(" ")
}
