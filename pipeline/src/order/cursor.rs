//! A place in the stream, small enough to stand in a checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::permutation::Order;
use super::schedule::{Turn, Visit};
use super::shuffle::ShuffleState;

/// The form of cursor this version writes.
const VERSION: u32 = 2;

/// A place in the stream: right after a batch. Resuming from it gives exactly the batches that
/// would have followed, and reads no shard again but those it was in the middle of and those of
/// which samples were in the shuffle buffer.
///
/// It carries what the order depends on, so that resuming with other settings is refused and never
/// gives another order silently. Decode threads, batch size and prefetching may differ.
///
/// As JSON it has a few hundred bytes, and about ten for each sample in the shuffle buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    version: u32,
    identity: OrderIdentity,
    /// Samples drawn from the shuffle buffer up to and with the batch's last, broken ones included.
    pub position: u64,
    /// Epoch of the batch's last sample, from 0.
    pub epoch: u64,
    /// Index of the batch that follows.
    pub next_batch: u64,
    /// Broken samples so far, by reason.
    pub broken: BTreeMap<String, u64>,
    pub(crate) place: Place,
    /// What is in the shuffle buffer, in its order.
    pub(crate) buffer: Vec<SampleRef>,
    /// Shards of which samples may still come, by the number of the visit.
    pub(crate) visits: BTreeMap<u64, Tally>,
}

/// Where the order stands: what decides, beside the shuffle buffer's samples, what comes next.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Place {
    /// The epoch that is read, from 0.
    pub(crate) epoch: u64,
    /// Samples of it that were chosen so far.
    pub(crate) accepted: u64,
    /// The shards it is in the middle of.
    pub(crate) open: Vec<OpenVisit>,
    /// Which of them the next sample comes from, modulo their number.
    pub(crate) turn: usize,
    /// The shard that follows when one of them ends.
    pub(crate) next: Turn,
    /// Shards begun so far.
    pub(crate) visits: u64,
    /// Samples read so far that the filter did not leave out.
    pub(crate) read: u64,
    pub(crate) shuffle: ShuffleState,
}

/// A shard that was begun and not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OpenVisit {
    #[serde(flatten)]
    pub(crate) visit: Visit,
    /// Samples taken from it.
    pub(crate) taken: u64,
    /// Those of them that were chosen.
    pub(crate) chosen: u64,
}

/// A sample, by the number of the visit and its own number in the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub(crate) struct SampleRef {
    pub(crate) visit: u64,
    pub(crate) index: u64,
}

impl From<(u64, u64)> for SampleRef {
    fn from((visit, index): (u64, u64)) -> Self {
        Self { visit, index }
    }
}

impl From<SampleRef> for (u64, u64) {
    fn from(sample: SampleRef) -> Self {
        (sample.visit, sample.index)
    }
}

/// What became so far of a shard of which samples may still come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub(crate) shard: usize,
    pub(crate) epoch: u64,
    /// Samples left out before the shuffle, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) left_out: BTreeMap<String, u64>,
    /// Of the samples chosen from it, those that have come through.
    pub(crate) through: u64,
    /// Those of them that were found broken then, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) undecodable: BTreeMap<String, u64>,
    /// Once it has been read: how many were chosen, and what was wrong with the tar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) done: Option<(u64, Option<String>)>,
}

/// Everything the order of samples depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OrderIdentity {
    pub(crate) seed: u64,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) order: Order,
    pub(crate) resample: bool,
    pub(crate) open_shards: usize,
    pub(crate) shuffle_buffer: usize,
    pub(crate) shuffle_buffer_mb: u64,
    pub(crate) max_samples: Option<u64>,
    /// Fingerprint of the list of shards.
    pub(crate) shards: String,
    /// Fingerprint of what chooses samples: the filter, image and caption keys.
    pub(crate) selection: String,
}

/// A cursor that belongs to another stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the saved place in the data was written with {field} = {saved}, and now {field} = {now}: \
         restore the setting, or start the data anew without the saved place"
)]
pub struct CursorMismatch {
    /// The setting that differs.
    pub field: &'static str,
    /// Its value in the cursor.
    pub saved: String,
    /// Its value now.
    pub now: String,
}

impl Cursor {
    pub(crate) fn new(identity: OrderIdentity, position: u64, epoch: u64, next_batch: u64) -> Self {
        Self {
            version: VERSION,
            identity,
            position,
            epoch,
            next_batch,
            broken: BTreeMap::new(),
            place: Place::default(),
            buffer: Vec::new(),
            visits: BTreeMap::new(),
        }
    }

    /// Refuses a cursor of another stream, naming the first setting that differs.
    pub(crate) fn check(&self, now: &OrderIdentity) -> Result<(), CursorMismatch> {
        let saved = &self.identity;
        let optional = |value: &Option<u64>| value.map_or("unset".to_owned(), |n| n.to_string());
        let order = |order: Order| format!("{order:?}").to_lowercase();
        let fields = [
            (
                "cursor version",
                self.version.to_string(),
                VERSION.to_string(),
            ),
            ("seed", saved.seed.to_string(), now.seed.to_string()),
            ("rank", saved.rank.to_string(), now.rank.to_string()),
            ("world", saved.world.to_string(), now.world.to_string()),
            ("order", order(saved.order), order(now.order)),
            ("shards", saved.shards.clone(), now.shards.clone()),
            (
                "resample_shards",
                saved.resample.to_string(),
                now.resample.to_string(),
            ),
            (
                "open_shards",
                saved.open_shards.to_string(),
                now.open_shards.to_string(),
            ),
            (
                "shuffle_buffer",
                saved.shuffle_buffer.to_string(),
                now.shuffle_buffer.to_string(),
            ),
            (
                "shuffle_buffer_mb",
                saved.shuffle_buffer_mb.to_string(),
                now.shuffle_buffer_mb.to_string(),
            ),
            (
                "max_samples",
                optional(&saved.max_samples),
                optional(&now.max_samples),
            ),
            (
                "filter and keys",
                saved.selection.clone(),
                now.selection.clone(),
            ),
        ];
        match fields.into_iter().find(|(_, saved, now)| saved != now) {
            Some((field, saved, now)) => Err(CursorMismatch { field, saved, now }),
            None => Ok(()),
        }
    }
}

/// A short name for a list of texts: equal lists have equal names.
pub(crate) fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    let mut count = 0_usize;
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
        count += 1;
    }
    let hex: String = hash
        .finalize()
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("{count}:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> OrderIdentity {
        OrderIdentity {
            seed: 1,
            rank: 0,
            world: 2,
            order: Order::Shuffled,
            resample: true,
            open_shards: 4,
            shuffle_buffer: 1000,
            shuffle_buffer_mb: 256,
            max_samples: None,
            shards: fingerprint(["a", "b"]),
            selection: fingerprint(["jpg"]),
        }
    }

    #[test]
    fn a_cursor_survives_json_and_stays_small() {
        let mut cursor = Cursor::new(identity(), 4_000_000, 3, 250_000);
        cursor.broken.insert("decode_error".into(), 2);
        let visit = |id| Visit {
            id,
            shard: 1200,
            epoch: 3,
        };
        cursor.place.open = (4000..4004)
            .map(|id| OpenVisit {
                visit: visit(id),
                taken: 3000,
                chosen: 2900,
            })
            .collect();
        for id in 3990..4004 {
            let tally = Tally {
                shard: 1200,
                epoch: 3,
                through: 2000,
                done: Some((2900, None)),
                ..Tally::default()
            };
            cursor.visits.insert(id, tally);
        }
        let without_buffer = serde_json::to_string(&cursor).unwrap().len();
        assert!(without_buffer < 3 << 10, "{without_buffer}");
        cursor.buffer = (0..1000)
            .map(|n| SampleRef {
                visit: 3990 + n % 14,
                index: 2000 + n,
            })
            .collect();
        let text = serde_json::to_string(&cursor).unwrap();
        assert!(text.len() - without_buffer <= 12 * 1000, "{}", text.len());
        assert_eq!(serde_json::from_str::<Cursor>(&text).unwrap(), cursor);
    }

    #[test]
    fn what_differs_is_named() {
        let cursor = Cursor::new(identity(), 12, 0, 3);
        assert_eq!(cursor.check(&identity()), Ok(()));
        let refused = |now: OrderIdentity| cursor.check(&now).unwrap_err().field;
        assert_eq!(
            refused(OrderIdentity {
                seed: 2,
                ..identity()
            }),
            "seed"
        );
        assert_eq!(
            refused(OrderIdentity {
                world: 4,
                ..identity()
            }),
            "world"
        );
        assert_eq!(
            refused(OrderIdentity {
                open_shards: 1,
                ..identity()
            }),
            "open_shards"
        );
        let mismatch = cursor
            .check(&OrderIdentity {
                shards: fingerprint(["a", "b", "c"]),
                max_samples: Some(1),
                ..identity()
            })
            .unwrap_err();
        assert!(mismatch.to_string().contains("shards = 2:"), "{mismatch}");
        assert!(mismatch.to_string().contains("shards = 3:"), "{mismatch}");
    }

    #[test]
    fn fingerprints_tell_lists_apart() {
        assert_ne!(fingerprint(["ab", "c"]), fingerprint(["a", "bc"]));
        assert_eq!(fingerprint(["ab", "c"]), fingerprint(["ab", "c"]));
    }
}
