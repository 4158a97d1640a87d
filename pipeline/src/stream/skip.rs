//! Skipped samples and finished shards.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::order::ShardProgress;
use crate::shard::Rejection;

/// Why a sample is skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SkipReason {
    /// The sample is broken.
    Broken(&'static str),
    /// The image is of this format, which is not read.
    UnreadFormat(&'static str),
    /// The filter rejects the sample.
    Filtered(Rejection),
}

impl SkipReason {
    pub(crate) const NO_IMAGE: Self = Self::Broken("no_image");
    pub(crate) const NO_LATENT: Self = Self::Broken("no_latent");
    pub(crate) const NO_EMBEDS: Self = Self::Broken("no_embeds");
    pub(crate) const NO_CAPTION: Self = Self::Broken("no_caption");
    pub(crate) const BAD_JSON: Self = Self::Broken("bad_json");
    pub(crate) const TOO_LARGE: Self = Self::Broken("too_large");
    pub(crate) const DECODE_ERROR: Self = Self::Broken("decode_error");
    pub(crate) const OTHER_ARRAY: Self = Self::Broken("other_array");

    /// Name in the metrics.
    pub(crate) fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Broken(name) => Cow::Borrowed(name),
            Self::UnreadFormat(format) => Cow::Owned(format!("format:{format}")),
            Self::Filtered(rejection) => Cow::Owned(rejection.to_string()),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::UnreadFormat(_))
    }
}

/// A skipped sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedSample {
    /// Index of the shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Key in the shard.
    pub key: Arc<str>,
    /// Name of the reason in the metrics: `decode_error`, `filter:min_size` …
    pub reason: String,
}

/// Counts of a finished shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSummary {
    /// Index of the shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Samples that the stream delivered from the shard.
    pub samples: u64,
    /// Skipped samples, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Fault of the tar, if it is truncated or damaged.
    pub broken: Option<String>,
}

impl From<ShardProgress> for ShardSummary {
    fn from(progress: ShardProgress) -> Self {
        let mut skipped = progress.left_out;
        let undecodable: u64 = progress.undecodable.values().sum();
        for (reason, count) in progress.undecodable {
            *skipped.entry(reason).or_default() += count;
        }
        Self {
            shard: progress.shard,
            samples: progress.drawn.saturating_sub(undecodable),
            skipped,
            broken: progress.done.and_then(|(_, broken)| broken),
        }
    }
}
