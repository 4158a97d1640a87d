//! What passes through the stream: one sequence of steps, the same whatever the timing.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::error::StreamError;
use super::prepare::SampleMeta;
use crate::shard::Rejection;

/// One reading of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Visit {
    /// Counts every shard this rank opens, from 0.
    pub(crate) id: u64,
    /// Index of the shard.
    pub(crate) shard: usize,
    pub(crate) epoch: u64,
}

/// Why a sample is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Something is wrong with it.
    Broken(&'static str),
    /// It isn't wanted.
    Filtered(Rejection),
}

impl Reason {
    pub(crate) const NO_IMAGE: Self = Self::Broken("no_image");
    pub(crate) const NO_CAPTION: Self = Self::Broken("no_caption");
    pub(crate) const BAD_JSON: Self = Self::Broken("bad_json");
    pub(crate) const TOO_LARGE: Self = Self::Broken("too_large");
    pub(crate) const DECODE_ERROR: Self = Self::Broken("decode_error");

    pub(crate) fn name(&self) -> Cow<'static, str> {
        match self {
            Self::Broken(name) => Cow::Borrowed(name),
            Self::Filtered(rejection) => Cow::Owned(rejection.to_string()),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Broken(_))
    }
}

/// A sample's json, parsed when something needs it.
#[derive(Debug)]
pub(crate) enum Json {
    None,
    Raw(Bytes),
    Parsed(Value),
}

pub(crate) fn parse_json(raw: &[u8]) -> Option<Value> {
    serde_json::from_slice(raw).ok()
}

/// A sample on its way: chosen, still compressed.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) visit: Visit,
    pub(crate) key: Arc<str>,
    /// Number in its shard, from 0.
    pub(crate) index: u64,
    pub(crate) image: Bytes,
    pub(crate) caption: String,
    pub(crate) json: Json,
}

/// A sample to be decoded.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) chosen: Chosen,
    /// Number in the stream, from 0.
    pub(crate) position: u64,
    /// Samples read so far that the filter did not leave out.
    pub(crate) read: u64,
}

/// One thing that happens to the stream, in its place.
#[derive(Debug)]
pub(crate) enum Step {
    /// A sample is ready: its pixels, `[3, R, R]`, 8 bit.
    Ready {
        visit: Visit,
        meta: Box<SampleMeta>,
        pixels: Vec<u8>,
    },
    /// A sample turned out broken when it was decoded.
    Undecodable {
        visit: Visit,
        reason: Reason,
        read: u64,
    },
    /// A sample of before the place the stream goes on from.
    Passed { visit: Visit, position: u64 },
    /// A sample was left out before the shuffle.
    LeftOut {
        visit: Visit,
        reason: Reason,
        read: u64,
    },
    /// A shard has been read: so many of its samples are in the stream.
    ShardDone {
        visit: Visit,
        chosen: u64,
        broken: Option<String>,
    },
    /// Every sample of an epoch is in the stream.
    EpochDone { read: u64 },
    /// Nothing more comes.
    Failed(StreamError),
}
