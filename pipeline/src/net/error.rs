//! Errors of reading and writing, with the setting or the action that helps.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use crate::bounded::TooLong;
use crate::plural::counted;
use crate::shard::UrlError;

/// The causes of an error in full, for a reader that asks for them. The error's message has them in short.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Details(pub String);

/// Why an object could not be read or written. The first line of a message says what was asked for and what came of it; the
/// second, where there is one, what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The object, bucket or file does not exist.
    #[error("{url}: not found ({cause})\n  check the name{hint}")]
    NotFound {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
        /// Further things to check.
        hint: &'static str,
    },
    /// The server denies access.
    #[error("{url}: access denied ({cause})\n  {hint}")]
    Forbidden {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
        /// The setting that helps.
        hint: &'static str,
    },
    /// No credentials were found to sign with.
    #[error(
        "{url}: no usable AWS credentials ({cause})\n  set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE (after \
         `aws sso login` where it uses SSO) or a role, or [s3] anonymous = true for a public bucket"
    )]
    Credentials {
        /// The object.
        url: String,
        /// The request, and the fault in short.
        cause: String,
        /// The answer of each provider of the chain.
        #[source]
        details: Details,
    },
    /// The credentials have expired, and a second look-up gave no newer ones.
    #[error(
        "{url}: the AWS credentials have expired ({cause}), and looking them up again gave no newer ones\n  get new ones (as with \
         `aws sso login`, or a new AWS_SESSION_TOKEN) and start again, or use a role or profile that renews them by itself"
    )]
    Expired {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
    },
    /// The signature in a URL has expired.
    #[error(
        "{url}: the signed URL has expired ({cause})\n  make new signed URLs that outlast the run, or name the shards as s3:// and \
         set credentials"
    )]
    ExpiredUrl {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
    },
    /// The object is in an archive and can't be read at once.
    #[error(
        "{url}: the object is archived ({cause})\n  restore it first (`aws s3api restore-object`, or a copy to another storage \
         class), and start again when that is done"
    )]
    Archived {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
    },
    /// The pages of a listing don't fit together, so that objects may be missing.
    #[error("{url}: the server's listing is wrong: {cause}\n  {hint}")]
    Listing {
        /// The prefix.
        url: String,
        /// The fault.
        cause: String,
        /// The way around it.
        hint: &'static str,
    },
    /// The server's certificate was not accepted.
    #[error("{url}: the certificate of {endpoint} is not accepted ({cause}){hint}")]
    Certificate {
        /// The object.
        url: String,
        /// The server's address.
        endpoint: String,
        /// The fault.
        cause: String,
        /// The setting that helps.
        hint: &'static str,
    },
    /// The certificate file can't be used.
    #[error("{setting} = {path:?}: {cause}")]
    CaBundle {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// The fault.
        cause: String,
    },
    /// A header for HTTP shards can't be sent.
    #[error("data.http_headers: {header}: {cause}")]
    Header {
        /// The server and the header's name.
        header: String,
        /// The fault.
        cause: String,
    },
    /// Shards were looked up before the run, and some of them can't be read.
    #[error("{found}: {named}{hint}")]
    Missing {
        /// How many of how many.
        found: String,
        /// The first of them, each with its cause.
        named: String,
        /// Things to check.
        hint: String,
    },
    /// Standard input was opened a second time.
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
        /// Line number, from 1.
        line: usize,
        /// The fault.
        error: UrlError,
    },
    /// The bucket is in another region.
    #[error("{url}: the bucket is in another region ({cause})\n  set [s3] region{}", right.as_ref().map_or(String::new(), |region| format!(" = {region:?}")))]
    WrongRegion {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
        /// The bucket's region, if the server names it.
        right: Option<String>,
    },
    /// The object changed while it was read. Two versions are never spliced.
    #[error(
        "{url}: the object changed while it was read (after {}: {cause}); start again when it no longer changes",
        counted(*offset, "byte")
    )]
    Changed {
        /// The object.
        url: String,
        /// Bytes read of the old version.
        offset: u64,
        /// How the change was detected.
        cause: String,
    },
    /// The server can't be reached.
    #[error(
        "{url}: can't connect to {endpoint} ({}): {cause}\n  check the network{hint}",
        counted(*attempts, "attempt")
    )]
    Unreachable {
        /// The object.
        url: String,
        /// The server's address.
        endpoint: String,
        /// Number of attempts.
        attempts: u32,
        /// The last failure.
        cause: String,
        /// Further things to check.
        hint: &'static str,
    },
    /// Passing faults used up the retry budget of a stretch of the object.
    #[error(
        "{url}: gave up after {} in {:.1} s, with {} read: {cause}",
        counted(*attempts, "attempt"),
        elapsed.as_secs_f64(),
        counted(*offset, "byte")
    )]
    Exhausted {
        /// The object.
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
    /// Passing faults used up the retry budget of a write.
    #[error(
        "{url}: not written, gave up after {} in {:.1} s: {cause}",
        counted(*attempts, "attempt"),
        elapsed.as_secs_f64()
    )]
    NotWritten {
        /// The object.
        url: String,
        /// Requests that failed.
        attempts: u32,
        /// Time since the first of them.
        elapsed: Duration,
        /// The last failure.
        cause: String,
    },
    /// The server's answer is final: a retry would not change it.
    #[error("{url}: {cause}")]
    Refused {
        /// The object.
        url: String,
        /// The server's answer.
        cause: String,
    },
    /// A file or a response is larger than what is read of it.
    #[error("{url}: {what} {error}")]
    TooLong {
        /// The object, or the folder that is listed.
        url: String,
        /// The file or the response.
        what: &'static str,
        /// The limit.
        error: TooLong,
    },
    /// The kind of URL does not support the operation.
    #[error("{url}: {cause}")]
    Unsupported {
        /// The object.
        url: String,
        /// Why not, and the right form.
        cause: String,
    },
    /// The folder has no shards.
    #[error(
        "{url}: no .tar, .tar.gz or .tgz files in it{found}\n  name a folder or prefix that has shards"
    )]
    EmptyFolder {
        /// The folder.
        url: String,
        /// Other files of the folder, and the remedy; empty for none.
        found: String,
    },
    /// The limit of open files was reached, and stayed so.
    #[error("{url}: {cause}")]
    OpenFiles {
        /// The object.
        url: String,
        /// The limit, and how to raise it.
        cause: String,
    },
    /// A local file can't be read.
    #[error("{url}: {cause}")]
    File {
        /// The file.
        url: String,
        /// The system's error.
        cause: String,
    },
    /// The embedded server can't start.
    #[error("[s3] embedded_root = {root:?}: {cause}")]
    Embedded {
        /// The folder to be served.
        root: PathBuf,
        /// The cause.
        cause: String,
    },
}

impl SourceError {
    /// Whether the configuration alone is at fault. A fault that only the server can know (a missing
    /// object, a refused credential) is a failure of the run.
    #[must_use]
    pub fn is_config(&self) -> bool {
        match self {
            Self::Unsupported { .. }
            | Self::Embedded { .. }
            | Self::CaBundle { .. }
            | Self::Header { .. }
            | Self::Url(_)
            | Self::List { .. } => true,
            Self::NotFound { .. }
            | Self::Forbidden { .. }
            | Self::Credentials { .. }
            | Self::Expired { .. }
            | Self::ExpiredUrl { .. }
            | Self::Archived { .. }
            | Self::Listing { .. }
            | Self::Certificate { .. }
            | Self::StdinAgain
            | Self::WrongRegion { .. }
            | Self::EmptyFolder { .. }
            | Self::Missing { .. }
            | Self::Changed { .. }
            | Self::TooLong { .. }
            | Self::Unreachable { .. }
            | Self::Exhausted { .. }
            | Self::NotWritten { .. }
            | Self::Refused { .. }
            | Self::OpenFiles { .. }
            | Self::File { .. } => false,
        }
    }
}

/// An error and its causes on one line, without causes that repeat the text before.
pub(crate) fn causes(error: &(dyn Error + 'static)) -> String {
    let text = causes_in_full(error);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines.join(" ")
}

/// An error and its causes as [`causes`], with their own lines.
pub(crate) fn causes_in_full(error: &(dyn Error + 'static)) -> String {
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
    text
}
