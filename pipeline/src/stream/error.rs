//! Why a stream ends.

use std::collections::BTreeMap;

use crate::flow::Closed;
use crate::order::CursorMismatch;
use crate::plural::counted;
use crate::shard::{FilterReport, UrlError};
use crate::source::SourceError;
use crate::stages::Stage;

use super::skip::SkipExamples;

/// Why a stream ends, or does not start.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A setting, or a combination of settings, is invalid.
    #[error("{0}")]
    Config(String),
    /// A shard's URL is wrong.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// There are fewer shards than lanes.
    #[error(
        "{} can't be shared between {}: each lane needs a shard of its own; share them between at most {shards}, or cut the data into \
         more shards",
        counted(*shards, "shard"),
        counted(*lanes, "lane")
    )]
    TooFewShards {
        /// Number of shards.
        shards: usize,
        /// Number of lanes.
        lanes: usize,
    },
    /// The cursor belongs to another stream.
    #[error(transparent)]
    Cursor(#[from] CursorMismatch),
    /// A shard has changed since the cursor was saved.
    #[error(
        "{url}: the saved position in the data needs its sample {sample}, which is no longer there or can no longer be used: \
         the shard changed; restore the old shard, or start from the beginning of the data without the saved position"
    )]
    ShardChanged {
        /// The shard.
        url: String,
        /// Number of the sample in the shard, from 0.
        sample: u64,
    },
    /// A shard differs from its entry in the manifest.
    #[error(
        "{url}: its {what} is {found}, and {listed} in the manifest beside it: the shard was damaged or replaced; copy it again, \
         or remove it and run coffey precompute again"
    )]
    OtherThanManifest {
        /// The shard.
        url: String,
        /// The property that differs.
        what: &'static str,
        /// Its value in the shard.
        found: String,
        /// Its value in the manifest.
        listed: String,
    },
    /// The source can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The object is not a shard.
    #[error("{url} is not a tar: {cause}; does the URL lead to a shard?")]
    NotATar {
        /// The object.
        url: String,
        /// The fault of its first header.
        cause: String,
    },
    /// No sample can be used.
    #[error("no sample can be used: {report}{examples}")]
    NothingUsable {
        /// Counts by reason, and json keys that no sample had.
        report: FilterReport,
        /// The first skipped sample of each reason.
        examples: SkipExamples,
    },
    /// More samples are broken than allowed.
    #[error(
        "{broken} of {read} samples are broken, more than max_bad_fraction = {allowed} allows: {}{examples}",
        list(counts)
    )]
    TooManyBroken {
        /// Broken samples.
        broken: u64,
        /// Samples read, without those that the filter rejected.
        read: u64,
        /// Largest allowed fraction, 0 to 1.
        allowed: f64,
        /// Broken samples by reason.
        counts: BTreeMap<String, u64>,
        /// The first broken sample of each reason.
        examples: SkipExamples,
    },
    /// A fault in this program.
    #[error("the {stage} stage failed by a fault in coffey: {message}")]
    Panicked {
        /// The stage of the thread.
        stage: Stage,
        /// The panic's message.
        message: String,
    },
    /// The system can't start a thread.
    #[error("can't start a thread: {0}")]
    Threads(String),
}

fn list(counts: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = counts
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    parts.join(", ")
}

impl StreamError {
    pub(crate) fn threads(error: &std::io::Error) -> Self {
        Self::Threads(error.to_string())
    }

    /// Whether the configuration is at fault, so that a retry can't help.
    #[must_use]
    pub fn is_config(&self) -> bool {
        match self {
            Self::Config(_) | Self::Url(_) | Self::TooFewShards { .. } | Self::Cursor(_) => true,
            Self::Source(error) => error.is_config(),
            Self::ShardChanged { .. }
            | Self::OtherThanManifest { .. }
            | Self::NotATar { .. }
            | Self::NothingUsable { .. }
            | Self::TooManyBroken { .. }
            | Self::Panicked { .. }
            | Self::Threads(_) => false,
        }
    }
}

/// Why a thread of the stream ends early.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The stream is being dropped.
    Closed,
    /// The stream ends in an error.
    Failed(StreamError),
}

impl From<StreamError> for Halt {
    fn from(error: StreamError) -> Self {
        Self::Failed(error)
    }
}

impl From<Closed> for Halt {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}
