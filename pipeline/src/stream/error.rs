//! Why a stream ended.

use std::collections::BTreeMap;

use crate::order::CursorMismatch;
use crate::shard::{FilterReport, UrlError};
use crate::source::SourceError;
use crate::stages::Stage;

use super::batch::{ShardSummary, SkippedSample};

/// What ended a stream, or kept it from starting.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A setting, or settings together, can't work.
    #[error("{0}")]
    Config(String),
    /// A shard's URL is wrong.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// Some rank would have nothing to read.
    #[error(
        "{shards} shards can't be shared between {world} ranks: every rank needs at least one; \
         start at most {shards} ranks, or cut the data into more shards"
    )]
    TooFewShards {
        /// Shards there are.
        shards: usize,
        /// Ranks there are.
        world: usize,
    },
    /// The place to go on from belongs to another stream.
    #[error(transparent)]
    Cursor(#[from] CursorMismatch),
    /// A shard is no longer what it was when the place to go on from was saved.
    #[error(
        "{url}: its sample {sample}, which the saved place in the data is in the middle of, is no longer there or can no longer be used: \
         the shard changed; put the old one back, or start the data anew without the saved place"
    )]
    ShardChanged {
        /// Which shard.
        url: String,
        /// Number of the sample in it, from 0.
        sample: u64,
    },
    /// Bytes could not be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The object is something else than a shard.
    #[error("{url} is not a tar: {cause}; does the URL lead to a shard?")]
    NotATar {
        /// Which object.
        url: String,
        /// What is wrong with its first header.
        cause: String,
    },
    /// Not one sample can be used.
    #[error("no sample can be used: {report}")]
    NothingUsable {
        /// Counts by reason, and json keys that were looked for in vain.
        report: FilterReport,
        /// The shards that were read to their end, which no batch could tell of.
        shards: Vec<ShardSummary>,
        /// Their samples.
        skipped: Vec<SkippedSample>,
    },
    /// More samples are broken than allowed.
    #[error(
        "{broken} of {read} samples are broken, more than max_bad_fraction = {allowed} allows: {}",
        list(counts)
    )]
    TooManyBroken {
        /// Broken samples.
        broken: u64,
        /// Samples read, without those the filter left out.
        read: u64,
        /// What is allowed, 0 to 1.
        allowed: f64,
        /// Broken samples by reason.
        counts: BTreeMap<String, u64>,
    },
    /// A fault in this program.
    #[error("the {stage} stage failed by a fault in coffey: {message}")]
    Panicked {
        /// Where.
        stage: Stage,
        /// The panic's message.
        message: String,
    },
    /// The system gives no more threads.
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

    /// Whether the configuration is at fault, so that running again as it is can't help.
    #[must_use]
    pub fn is_config(&self) -> bool {
        match self {
            Self::Config(_) | Self::Url(_) | Self::TooFewShards { .. } | Self::Cursor(_) => true,
            Self::Source(error) => error.is_config(),
            Self::ShardChanged { .. }
            | Self::NotATar { .. }
            | Self::NothingUsable { .. }
            | Self::TooManyBroken { .. }
            | Self::Panicked { .. }
            | Self::Threads(_) => false,
        }
    }
}
