//! Cursors as checkpoints hold them, also those of earlier versions.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Cursor, LaneCursor, OrderIdentity, OrderState, SampleRef, ShardProgress, VERSION};
use crate::order::Order;

/// A cursor as a checkpoint holds it. Version 2 was the position in one sequence, of one of `world` processes.
#[derive(Deserialize)]
pub(super) struct StoredCursor {
    version: u32,
    identity: StoredIdentity,
    #[serde(default)]
    taken: usize,
    lanes: Option<Vec<LaneCursor>>,
    position: Option<u64>,
    epoch: Option<u64>,
    next_batch: Option<u64>,
    broken: Option<BTreeMap<String, u64>>,
    place: Option<OrderState>,
    buffer: Option<Vec<SampleRef>>,
    visits: Option<BTreeMap<u64, ShardProgress>>,
}

#[derive(Deserialize)]
struct StoredIdentity {
    seed: u64,
    lanes: Option<usize>,
    rank: Option<usize>,
    world: Option<usize>,
    order: Order,
    resample: bool,
    open_shards: usize,
    shuffle_buffer: usize,
    shuffle_buffer_mb: u64,
    max_samples: Option<u64>,
    shards: String,
    selection: String,
}

/// The error for a cursor that can't be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoredCursorError {
    #[error("cursor of version {0}, and this coffey reads versions 2 and {VERSION}")]
    Version(u32),
    #[error("missing field `{0}`")]
    Missing(&'static str),
}

impl TryFrom<StoredCursor> for Cursor {
    type Error = StoredCursorError;

    fn try_from(stored: StoredCursor) -> Result<Self, StoredCursorError> {
        use StoredCursorError::Missing;
        let saved = stored.identity;
        let (count, lanes) = match stored.version {
            VERSION => (
                saved.lanes.ok_or(Missing("lanes"))?,
                stored.lanes.ok_or(Missing("lanes"))?,
            ),
            2 => {
                let lane = LaneCursor {
                    lane: saved.rank.ok_or(Missing("rank"))?,
                    position: stored.position.ok_or(Missing("position"))?,
                    epoch: stored.epoch.ok_or(Missing("epoch"))?,
                    next_batch: stored.next_batch.ok_or(Missing("next_batch"))?,
                    broken: stored.broken.ok_or(Missing("broken"))?,
                    state: stored.place.ok_or(Missing("place"))?,
                    buffer: stored.buffer.ok_or(Missing("buffer"))?,
                    shards: stored.visits.ok_or(Missing("visits"))?,
                };
                (saved.world.ok_or(Missing("world"))?, vec![lane])
            }
            other => return Err(StoredCursorError::Version(other)),
        };
        let identity = OrderIdentity {
            seed: saved.seed,
            lanes: count,
            order: saved.order,
            resample: saved.resample,
            open_shards: saved.open_shards,
            shuffle_buffer: saved.shuffle_buffer,
            shuffle_buffer_mb: saved.shuffle_buffer_mb,
            max_samples: saved.max_samples,
            shards: saved.shards,
            selection: saved.selection,
        };
        Ok(Self::in_lanes(identity, lanes, stored.taken))
    }
}
