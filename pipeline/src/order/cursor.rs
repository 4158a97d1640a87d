//! A place in the stream, small enough to stand in a checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::permutation::Order;

/// The form of cursor this version writes.
const VERSION: u32 = 1;

/// A place in the stream: right after a batch. Resuming from it gives exactly the batches that
/// would have followed.
///
/// It carries what the order depends on, so that resuming with other settings is refused and never
/// gives another order silently. Decode threads, batch size and prefetching may differ.
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
    /// Samples found broken after they were drawn (when decoded), by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Of these, the ones in shards of which samples may still come, by the number of the visit.
    pub(crate) open_visits: BTreeMap<u64, BTreeMap<String, u64>>,
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
            skipped: BTreeMap::new(),
            open_visits: BTreeMap::new(),
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
            max_samples: None,
            shards: fingerprint(["a", "b"]),
            selection: fingerprint(["jpg"]),
        }
    }

    #[test]
    fn a_cursor_survives_json_and_stays_small() {
        let mut cursor = Cursor::new(identity(), 12, 1, 3);
        cursor.skipped.insert("decode_error".into(), 2);
        cursor.open_visits.insert(7, cursor.skipped.clone());
        let text = serde_json::to_string(&cursor).unwrap();
        assert!(text.len() < 1024, "{text}");
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
