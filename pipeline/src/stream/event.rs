//! Events of the stream: one sequence that is independent of timing.

use std::sync::Arc;

use bytes::Bytes;

use super::error::StreamError;
use super::kinds::SampleKind;
use super::sample::SampleMeta;
use super::skip::SkipReason;
use crate::json::{Document, SampleJson, read_sample_json};
use crate::order::{OrderState, SampleRef, ShardPass};

/// A sample's json, parsed only where the filter needs it.
#[derive(Debug)]
pub(super) enum Json {
    None,
    Raw(Bytes),
    Parsed(Document),
}

impl Json {
    pub(super) fn parse(self) -> Option<SampleJson> {
        match self {
            Self::None => None,
            Self::Raw(raw) => Some(read_sample_json(&raw)),
            Self::Parsed(document) => Some(Ok(document)),
        }
    }
}

/// A sample that passed the filter, not yet decoded.
#[derive(Debug)]
pub(super) struct SelectedSample<K: SampleKind> {
    pub(super) pass: ShardPass,
    pub(super) key: Arc<str>,
    /// Number in the shard, from 0.
    pub(super) index: u64,
    pub(super) encoded: K::Encoded,
    pub(super) caption: String,
    pub(super) json: Json,
}

/// Bytes of a caption and json that don't count, so that only unusual ones change when the shuffle buffer is full.
const USUAL_TEXT: usize = 64 << 10;

impl<K: SampleKind> SelectedSample<K> {
    /// Size of the members to be decoded, and of what the caption and json have beyond [`USUAL_TEXT`]. Bytes.
    pub(super) fn bytes(&self) -> usize {
        let json = match &self.json {
            Json::None => 0,
            Json::Raw(raw) => raw.len(),
            Json::Parsed(document) => document.text().len(),
        };
        let text = (self.caption.len() + json).saturating_sub(USUAL_TEXT);
        K::encoded_bytes(&self.encoded) + text
    }
}

/// A sample to be decoded.
#[derive(Debug)]
pub(super) struct DecodeJob<K: SampleKind> {
    pub(super) sample: SelectedSample<K>,
    pub(super) lane: usize,
    /// Number in the lane, from 0.
    pub(super) position: u64,
    pub(super) draw: Box<ShuffleDraw>,
}

/// Record of a draw from the shuffle buffer, from which the batcher makes its cursors.
#[derive(Debug)]
pub(super) struct ShuffleDraw {
    /// Samples pushed to the shuffle buffer since the draw before.
    pub(super) pushed: Vec<SampleRef>,
    /// The slot of the buffer that was drawn.
    pub(super) slot: usize,
    /// State of the interleaver after the draw.
    pub(super) state: OrderState,
}

/// One event of the stream.
#[derive(Debug)]
pub(super) enum StreamEvent<K: SampleKind> {
    /// A sample was decoded.
    Decoded {
        pass: ShardPass,
        meta: Box<SampleMeta>,
        data: K::Decoded,
        draw: Box<ShuffleDraw>,
    },
    /// A sample failed to decode.
    Undecodable {
        pass: ShardPass,
        key: Arc<str>,
        reason: SkipReason,
        cause: String,
        draw: Box<ShuffleDraw>,
    },
    /// A sample was skipped before the shuffle, after `read` samples.
    Skipped {
        pass: ShardPass,
        key: Arc<str>,
        reason: SkipReason,
        /// Description of the sample, if it is an example for its reason.
        example: Option<String>,
        read: u64,
    },
    /// A shard was read: `selected` of its samples are in the stream.
    ShardDone {
        pass: ShardPass,
        selected: u64,
        broken: Option<String>,
    },
    /// All samples of an epoch are in the stream, after `read` samples.
    EpochDone { read: u64 },
    /// The stream ends in an error.
    Failed(StreamError),
}
