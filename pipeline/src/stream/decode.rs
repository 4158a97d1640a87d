//! The work of the decode threads: one sample from the bytes in its shard to data for a batch.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::flow::StageHandle;
use crate::order::Order;
use crate::order::rng::rng;
use crate::shard::ShardUrl;

use super::config::StreamConfig;
use super::event::{DecodeJob, StreamEvent};
use super::kinds::{DecodeFailure, SampleKind};
use super::sample::SampleMeta;

/// Factor that spreads neighbouring sample numbers over the 64 bits of the random key. Odd.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// State of one decode thread.
#[derive(Debug, Clone)]
pub(super) struct DecodeWorker<K> {
    kind: K,
    seed: u64,
    /// Whether an epoch may hold a sample twice. The random key then holds the shard pass instead of the epoch.
    repeats: bool,
    /// Lanes that share the shards.
    lanes: u64,
    /// For each shard a number derived from its URL. It identifies the shard in the random key, so that a
    /// sample keeps its crop when shards are added to the list or removed.
    shard_keys: Arc<[u64]>,
    stage: StageHandle,
}

/// The first 8 bytes of the SHA-256 of a shard's identity.
fn shard_key(url: &ShardUrl) -> u64 {
    let hash = Sha256::digest(url.identity());
    hash.iter()
        .take(8)
        .fold(0_u64, |key, &byte| key << 8 | u64::from(byte))
}

impl<K: SampleKind> DecodeWorker<K> {
    pub(super) fn new(kind: K, config: &StreamConfig, stage: StageHandle) -> Self {
        Self {
            kind,
            seed: config.seed,
            repeats: config.order == Order::Shuffled && config.resample,
            lanes: config.lanes.count as u64,
            shard_keys: config.shards.iter().map(shard_key).collect(),
            stage,
        }
    }

    pub(super) fn decode(&mut self, job: DecodeJob<K>) -> StreamEvent<K> {
        let DecodeJob {
            sample,
            lane,
            position,
            draw,
        } = job;
        let pass = sample.pass;
        self.stage.add_items(1);
        self.stage.add_bytes(sample.bytes() as u64);
        let occasion = if self.repeats {
            pass.id * self.lanes + lane as u64
        } else {
            pass.epoch
        };
        let sample_key =
            self.shard_keys[pass.shard].wrapping_add(sample.index.wrapping_mul(SPREAD));
        let mut rng = rng(self.seed, "crop", occasion, sample_key);
        let json = sample.json.parse();
        let document = json.as_ref().and_then(|json| json.as_ref().ok());
        match self.kind.decode(&sample.encoded, document, &mut rng) {
            Ok((data, geometry)) => StreamEvent::Decoded {
                pass,
                draw,
                data,
                meta: Box::new(SampleMeta {
                    key: sample.key,
                    shard: pass.shard,
                    position,
                    epoch: pass.epoch,
                    caption: sample.caption,
                    json,
                    geometry,
                }),
            },
            Err(DecodeFailure { reason, cause }) => {
                tracing::debug!(key = %sample.key, cause, "sample skipped");
                StreamEvent::Undecodable {
                    pass,
                    key: sample.key,
                    reason,
                    cause,
                    draw,
                }
            }
        }
    }
}
