//! Skipped samples of a stream: counts, examples, and whether any shard still has a usable sample.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::order::Order;
use crate::shard::{FilterReport, ShardUrl};

use super::config::StreamConfig;
use super::error::StreamError;
use super::skip::{ShardSummary, SkipExample, SkipExamples};

/// The samples left out since the stream was opened or resumed.
pub(super) struct LeftOut {
    shards: Arc<[ShardUrl]>,
    counts: BTreeMap<String, u64>,
    examples: BTreeMap<String, SkipExample>,
    /// Whether samples that fail to decode end the stream once no shard has another sample. Not with `max_samples`, which
    /// cuts shards.
    judges_decoding: bool,
    /// Shards that were read whole and gave no sample, since the last decoded sample.
    unusable: BTreeSet<usize>,
    /// Samples that failed to decode since the last decoded sample.
    undecodable: u64,
}

impl LeftOut {
    pub(super) fn new(config: &StreamConfig, shards: Arc<[ShardUrl]>) -> Self {
        Self {
            shards,
            counts: BTreeMap::new(),
            examples: BTreeMap::new(),
            judges_decoding: config.order == Order::Shuffled && config.max_samples.is_none(),
            unusable: BTreeSet::new(),
            undecodable: 0,
        }
    }

    /// Counts a sample skipped before the shuffle. `example` describes it, if it is one for its reason.
    pub(super) fn count(
        &mut self,
        shard: usize,
        key: &Arc<str>,
        reason: &str,
        example: Option<String>,
    ) {
        *self.counts.entry(reason.to_owned()).or_default() += 1;
        if let Some(what) = example {
            let example = self.example(shard, Some(key), what);
            self.examples.insert(reason.to_owned(), example);
        }
    }

    /// Counts a sample skipped after the shuffle, because of `cause`.
    pub(super) fn count_drawn(
        &mut self,
        shard: usize,
        key: &Arc<str>,
        reason: &str,
        cause: String,
    ) {
        let is_first = !self.examples.contains_key(reason);
        self.count(shard, key, reason, is_first.then_some(cause));
        self.undecodable += 1;
    }

    /// Notes a broken shard.
    pub(super) fn broken_shard(&mut self, shard: usize, cause: &str) {
        if !self.examples.contains_key("broken_shard") {
            let example = self.example(shard, None, cause.to_owned());
            self.examples.insert("broken_shard".to_owned(), example);
        }
    }

    fn example(&self, shard: usize, key: Option<&Arc<str>>, what: String) -> SkipExample {
        SkipExample {
            shard: self.shards[shard].to_string(),
            key: key.cloned(),
            what,
        }
    }

    /// A sample was decoded.
    pub(super) fn decoded(&mut self) {
        self.unusable.clear();
        self.undecodable = 0;
    }

    /// All samples of a shard were drawn.
    pub(super) fn finished(&mut self, summary: &ShardSummary) {
        if summary.samples == 0 {
            self.unusable.insert(summary.shard);
        }
    }

    /// Fails if every shard was read whole since the last decoded sample, and all selected samples failed to decode.
    pub(super) fn check_usable(&self) -> Result<(), StreamError> {
        if self.judges_decoding && self.undecodable > 0 && self.unusable.len() == self.shards.len()
        {
            return Err(self.nothing_usable());
        }
        Ok(())
    }

    /// The error if samples were selected, and none could be decoded.
    pub(super) fn nothing_usable(&self) -> StreamError {
        StreamError::NothingUsable {
            report: FilterReport {
                seen: self.counts.values().sum(),
                rejected: self.counts.clone(),
                ..FilterReport::default()
            },
            examples: SkipExamples::default(),
        }
    }

    /// Adds the examples that belong to an error.
    pub(super) fn illustrate(&self, error: &mut StreamError) {
        match error {
            StreamError::NothingUsable { examples, .. } => examples.0.clone_from(&self.examples),
            StreamError::TooManyBroken {
                examples, counts, ..
            } => {
                examples.0.clone_from(&self.examples);
                examples.0.retain(|reason, _| counts.contains_key(reason));
            }
            _ => {}
        }
    }
}
