//! Selection of samples: members, caption, json, filter.

use std::sync::Arc;

use super::config::StreamConfig;
use super::event::{Json, SelectedSample};
use super::explain::Explainer;
use super::kinds::SampleKind;
use super::skip::SkipReason;
use crate::format::latents::JSON;
use crate::json::Document;
use crate::order::ShardPass;
use crate::shard::{FilterReport, FilterState, MAX_CAPTION_BYTES, Sample};

/// If no sample has passed after this many samples and some filter rule's json key has never appeared, a warning says so.
const MISSING_KEY_AFTER: u64 = 10_000;

/// Selects samples and counts those that are skipped.
pub(super) struct SampleSelector<K> {
    kind: K,
    caption_keys: Vec<String>,
    needs_json: bool,
    filter: FilterState,
    explainer: Explainer,
}

/// A sample that was not selected.
pub(super) struct Unselected {
    pub(super) key: Arc<str>,
    pub(super) reason: SkipReason,
}

impl<K: SampleKind> SampleSelector<K> {
    pub(super) fn new(kind: K, config: &StreamConfig) -> Self {
        Self {
            kind,
            caption_keys: config.caption_keys.clone(),
            needs_json: config.filter.needs_json(),
            filter: FilterState::new(config.filter.clone()),
            explainer: Explainer::new(config),
        }
    }

    /// Selects or skips sample number `index` of a shard.
    pub(super) fn select(
        &mut self,
        pass: ShardPass,
        index: u64,
        sample: &Sample,
    ) -> Result<SelectedSample<K>, Unselected> {
        self.try_select(pass, index, sample)
            .map_err(|reason| Unselected {
                key: Arc::clone(&sample.key),
                reason: if sample.is_part && reason.is_missing_member() {
                    SkipReason::DUPLICATE_MEMBER
                } else {
                    reason
                },
            })
    }

    fn try_select(
        &mut self,
        pass: ShardPass,
        index: u64,
        sample: &Sample,
    ) -> Result<SelectedSample<K>, SkipReason> {
        self.filter.saw();
        if sample.excess.is_some() || sample.oversized.contains_key(JSON) {
            return Err(SkipReason::TOO_LARGE);
        }
        let encoded = self.kind.select(sample)?;
        let caption = self.caption(sample)?;
        let json = match sample.members.get(JSON) {
            None => Json::None,
            Some(raw) if self.needs_json => {
                Json::Parsed(Document::parse(raw).map_err(|_| SkipReason::BAD_JSON)?)
            }
            Some(raw) => Json::Raw(raw.clone()),
        };
        let parsed = match &json {
            Json::Parsed(document) => Some(document),
            Json::None | Json::Raw(_) => None,
        };
        self.filter
            .check(parsed, &caption)
            .map_err(SkipReason::Filtered)?;
        Ok(SelectedSample {
            pass,
            key: Arc::clone(&sample.key),
            index,
            encoded,
            caption,
            json,
        })
    }

    /// The caption of `sample`. Empty if there is none and the kind needs none.
    fn caption(&self, sample: &Sample) -> Result<String, SkipReason> {
        match sample.pick(&self.caption_keys) {
            Some((_, caption)) if caption.len() as u64 > MAX_CAPTION_BYTES => {
                Err(SkipReason::CAPTION_TOO_LONG)
            }
            Some((_, caption)) => Ok(String::from_utf8_lossy(caption).into_owned()),
            None if self.has_long_caption(sample) => Err(SkipReason::CAPTION_TOO_LONG),
            None if self.kind.needs_caption() => Err(SkipReason::NO_CAPTION),
            None => Ok(String::new()),
        }
    }

    fn has_long_caption(&self, sample: &Sample) -> bool {
        let mut keys = self.caption_keys.iter();
        keys.any(|key| sample.oversized.contains_key(key))
    }

    /// Counts a skipped sample for the report. Returns its description if it is an example for its reason.
    pub(super) fn count_skipped(
        &mut self,
        pass: ShardPass,
        sample: &Sample,
        reason: &SkipReason,
    ) -> Option<String> {
        let first = self.filter.count(&reason.name()) == 1;
        self.explainer.explain(pass, sample, reason, first)
    }

    /// No more samples of a shard follow.
    pub(super) fn end_shard(&mut self, pass: ShardPass) {
        self.explainer.end_shard(pass.id);
    }

    /// Whether exactly [`MISSING_KEY_AFTER`] samples were seen and some filter rule's json key has not appeared.
    pub(super) fn begins_to_miss_a_key(&self) -> bool {
        self.filter.lacks_a_key_at(MISSING_KEY_AFTER)
    }

    pub(super) fn report(&self) -> FilterReport {
        self.filter.report()
    }
}
