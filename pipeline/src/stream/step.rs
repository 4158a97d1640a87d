//! What passes through the stream: one sequence of steps, the same whatever the timing.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::content::{BatchContent, Members};
use super::error::StreamError;
use super::prepare::SampleMeta;
use crate::order::{Place, SampleRef, Visit};
use crate::shard::Rejection;

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
    pub(crate) const NO_LATENT: Self = Self::Broken("no_latent");
    pub(crate) const NO_EMBEDS: Self = Self::Broken("no_embeds");
    pub(crate) const NO_CAPTION: Self = Self::Broken("no_caption");
    pub(crate) const BAD_JSON: Self = Self::Broken("bad_json");
    pub(crate) const TOO_LARGE: Self = Self::Broken("too_large");
    pub(crate) const DECODE_ERROR: Self = Self::Broken("decode_error");
    pub(crate) const OTHER_ARRAY: Self = Self::Broken("other_array");

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

/// A sample on its way: chosen, still as it is in the shard.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) visit: Visit,
    pub(crate) key: Arc<str>,
    /// Number in its shard, from 0.
    pub(crate) index: u64,
    pub(crate) members: Members,
    pub(crate) caption: String,
    pub(crate) json: Json,
}

/// A sample to be decoded.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) chosen: Chosen,
    /// Number in the stream, from 0.
    pub(crate) position: u64,
    pub(crate) draw: Box<Draw>,
}

/// What drawing a sample did to the order: enough to know it without having been there.
#[derive(Debug)]
pub(crate) struct Draw {
    /// Samples put into the shuffle buffer since the draw before.
    pub(crate) pushed: Vec<SampleRef>,
    /// The slot of the buffer that was emptied then.
    pub(crate) slot: usize,
    /// Where the order stands after it.
    pub(crate) place: Place,
}

/// One thing that happens to the stream, in its place.
#[derive(Debug)]
pub(crate) enum Step {
    /// A sample is ready, a batch of one.
    Ready {
        visit: Visit,
        meta: Box<SampleMeta>,
        content: BatchContent,
        draw: Box<Draw>,
    },
    /// A sample turned out broken when it was decoded.
    Undecodable {
        visit: Visit,
        key: Arc<str>,
        reason: Reason,
        draw: Box<Draw>,
    },
    /// A sample was left out before the shuffle, when `read` had been read.
    LeftOut {
        visit: Visit,
        key: Arc<str>,
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
