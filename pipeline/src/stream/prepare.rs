//! The decode threads' work: one sample from the bytes in its shard to what the models read.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::flow::StageHandle;
use crate::image::{CropWindow, DecodeError, ImageOptions, SquareMaker, Squares};
use crate::order::Order;
use crate::order::rng::{Rng, rng};

use super::config::StreamConfig;
use super::content::{BatchContent, Members};
use super::latent::{self, ArrayError};
use super::step::{Job, Json, Reason, Step, parse_json};

/// What is known of a sample in a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleMeta {
    /// Its key in the shard.
    pub key: Arc<str>,
    /// Index of its shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Its number in the stream, from 0; samples found broken later have numbers too.
    pub position: u64,
    /// The epoch it was read in, from 0.
    pub epoch: u64,
    /// The caption, as it is in the shard; empty where latents come with embeddings and without one.
    pub caption: String,
    /// The sample's json, if it has any that parses.
    pub json: Option<serde_json::Value>,
    /// Width and height of the image in the shard. Pixels. This and what follows is of latents what
    /// their json says, zeros where it says nothing.
    pub original: (u32, u32),
    /// Width and height after resizing, before cropping. Pixels.
    pub resized: (u32, u32),
    /// Where in the resized image each of its squares was cut; of latents the one that was drawn.
    pub crops: Vec<CropWindow>,
}

/// Which part of an image a sample is, as [`SampleMeta`] has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct View {
    pub(super) original: (u32, u32),
    pub(super) resized: (u32, u32),
    pub(super) crops: Vec<CropWindow>,
}

/// One worker's state.
#[derive(Debug)]
pub(super) struct Preparer {
    options: ImageOptions,
    seed: u64,
    /// Whether one epoch may hold a sample twice, so that its randomness must go by the visit.
    repeats: bool,
    rank: u64,
    world: u64,
    /// For each shard a number made of its URL: it names the shard in the random key, so that a
    /// sample keeps its crop when shards are added to the list or left out.
    shard_names: Arc<[u64]>,
    squares: SquareMaker,
    stage: StageHandle,
}

impl Clone for Preparer {
    fn clone(&self) -> Self {
        Self {
            shard_names: Arc::clone(&self.shard_names),
            // Work space isn't shared.
            squares: SquareMaker::default(),
            stage: self.stage.clone(),
            ..*self
        }
    }
}

impl Preparer {
    pub(super) fn new(config: &StreamConfig, stage: StageHandle) -> Self {
        let name = |url: &crate::ShardUrl| {
            let hash = Sha256::digest(url.to_string());
            hash.iter()
                .take(8)
                .fold(0_u64, |name, &byte| name << 8 | u64::from(byte))
        };
        Self {
            options: config.image,
            seed: config.seed,
            repeats: config.order == Order::Shuffled && config.resample,
            rank: config.rank as u64,
            world: config.world as u64,
            shard_names: config.shards.iter().map(name).collect(),
            squares: SquareMaker::default(),
            stage,
        }
    }

    pub(super) fn prepare(&mut self, job: Job) -> Step {
        let Job {
            chosen,
            position,
            draw,
        } = job;
        let visit = chosen.visit;
        self.stage.add_items(1);
        self.stage.add_bytes(chosen.members.bytes() as u64);
        let occasion = if self.repeats {
            visit.id * self.world + self.rank
        } else {
            visit.epoch
        };
        // An odd factor spreads neighbouring samples over all of the key.
        let name = self.shard_names[visit.shard]
            .wrapping_add(chosen.index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut rng = rng(self.seed, "crop", occasion, name);
        let json = match chosen.json {
            Json::None => None,
            Json::Raw(raw) => parse_json(&raw),
            Json::Parsed(value) => Some(value),
        };
        let made = match &chosen.members {
            Members::Image(image) => self.squares(image, &mut rng),
            Members::Latents {
                moments,
                prompt_embeds,
            } => latent::read(moments, prompt_embeds.as_ref(), json.as_ref(), &mut rng)
                .map_err(Fault::from),
        };
        let (content, view) = match made {
            Ok(made) => made,
            Err(Fault { reason, cause }) => {
                tracing::debug!(key = %chosen.key, cause, "sample left out");
                return Step::Undecodable {
                    visit,
                    key: chosen.key,
                    reason,
                    draw,
                };
            }
        };
        let View {
            original,
            resized,
            crops,
        } = view;
        Step::Ready {
            visit,
            draw,
            content,
            meta: Box::new(SampleMeta {
                key: chosen.key,
                shard: visit.shard,
                position,
                epoch: visit.epoch,
                caption: chosen.caption,
                json,
                original,
                resized,
                crops,
            }),
        }
    }

    fn squares(&mut self, image: &[u8], rng: &mut Rng) -> Result<(BatchContent, View), Fault> {
        let Squares {
            pixels,
            original,
            resized,
            windows,
        } = self.squares.make(image, &self.options, rng)?;
        let content = BatchContent::Pixels {
            levels: pixels,
            resolution: self.options.resolution,
        };
        let view = View {
            original,
            resized,
            crops: windows,
        };
        Ok((content, view))
    }
}

/// Why a sample is left out, for the counts and in words.
struct Fault {
    reason: Reason,
    cause: String,
}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        Self {
            cause: error.to_string(),
            reason: match error {
                DecodeError::TooLarge { .. } => Reason::TOO_LARGE,
                DecodeError::UnknownFormat | DecodeError::Damaged(_) => Reason::DECODE_ERROR,
            },
        }
    }
}

impl From<ArrayError> for Fault {
    fn from(error: ArrayError) -> Self {
        Self {
            cause: error.to_string(),
            reason: match error {
                ArrayError::Damaged(_) => Reason::DECODE_ERROR,
                ArrayError::Other { .. } => Reason::OTHER_ARRAY,
            },
        }
    }
}
