//! Skipped samples and finished shards.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::order::ShardProgress;
use crate::shard::Rejection;
use crate::text::escaped;

/// Why a sample is skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SkipReason {
    /// The sample is broken.
    Broken(&'static str),
    /// The image is of this format, which is not read.
    UnreadFormat(&'static str),
    /// The sample repeats members of the sample before it.
    Duplicate(&'static str),
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
    pub(crate) const DUPLICATE_KEY: Self = Self::Duplicate("duplicate_key");
    pub(crate) const DUPLICATE_MEMBER: Self = Self::Duplicate("duplicate_member");

    /// Name in the metrics.
    pub(crate) fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Broken(name) | Self::Duplicate(name) => Cow::Borrowed(name),
            Self::UnreadFormat(format) => Cow::Owned(format!("format:{format}")),
            Self::Filtered(rejection) => Cow::Owned(rejection.to_string()),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::UnreadFormat(_))
    }

    /// Whether the sample has no image or no caption.
    pub(crate) fn is_missing_member(&self) -> bool {
        matches!(*self, Self::NO_IMAGE | Self::NO_CAPTION)
    }
}

/// The first sample that was skipped for a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkipExample {
    /// URL of the shard, without secrets.
    pub shard: String,
    /// Key in the shard; `None` if the whole shard is broken.
    pub key: Option<Arc<str>>,
    /// Members of the sample and the remedy, or the fault; empty for filter rules.
    pub what: String,
}

/// The first skipped sample of each reason.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SkipExamples(pub BTreeMap<String, SkipExample>);

impl fmt::Display for SkipExamples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, SkipExample { shard, key, what }) in &self.0 {
            write!(f, "; the first {reason} is ")?;
            if let Some(key) = key {
                write!(f, "sample {key:?} of ")?;
            }
            let gap = if what.is_empty() { "" } else { ", which " };
            write!(f, "{shard}{gap}{}", escaped(what))?;
        }
        Ok(())
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

/// Samples and shards that no batch of a stream lists, because the stream ended in an error.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Undelivered {
    /// Samples skipped since the last batch, in the order of the stream.
    pub skipped: Vec<SkippedSample>,
    /// Shards that were read to their end since the last batch.
    pub finished_shards: Vec<ShardSummary>,
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
