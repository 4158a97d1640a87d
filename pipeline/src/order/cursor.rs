//! The cursor: a position in the stream, small enough to be part of a checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::plan::Order;
use super::schedule::{SchedulePosition, ShardPass};
use super::shuffle::ShuffleState;

/// Version of the cursor's format.
const VERSION: u32 = 2;

/// A position in the stream: right after a batch. Resuming from it gives exactly the batches that
/// would have followed. Only open shards and shards with samples in the shuffle buffer are read again.
///
/// The cursor holds everything the order depends on, so that resuming with other settings is refused.
/// Decode threads, batch size and prefetching may differ.
///
/// As JSON it takes a few hundred bytes, and about ten for each sample in the shuffle buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    version: u32,
    identity: OrderIdentity,
    /// Samples drawn from the shuffle buffer up to the batch's last, which is counted, as are broken samples.
    pub position: u64,
    /// Epoch of the batch's last sample, from 0.
    pub epoch: u64,
    /// Index of the batch that follows.
    pub next_batch: u64,
    /// Broken samples so far, by reason.
    pub broken: BTreeMap<String, u64>,
    #[serde(rename = "place")]
    pub(crate) state: OrderState,
    /// Contents of the shuffle buffer, in the buffer's order.
    pub(crate) buffer: Vec<SampleRef>,
    /// Shards whose samples may still come, by [`ShardPass::id`].
    #[serde(rename = "visits")]
    pub(crate) shards: BTreeMap<u64, ShardProgress>,
}

/// State of the interleaver. With the contents of the shuffle buffer it decides which samples follow.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct OrderState {
    /// The epoch being read, from 0.
    pub(crate) epoch: u64,
    /// Samples of the epoch that were selected so far.
    pub(crate) accepted: u64,
    /// The open shards.
    pub(crate) open: Vec<OpenPass>,
    /// Index in `open` of the shard that the next sample comes from, modulo the number of open shards.
    pub(crate) turn: usize,
    /// The shard that follows when an open shard ends.
    pub(crate) next: SchedulePosition,
    /// Shards begun so far: the next [`ShardPass::id`].
    #[serde(rename = "visits")]
    pub(crate) passes: u64,
    /// Samples read so far, without those that the filter rejected.
    pub(crate) read: u64,
    pub(crate) shuffle: ShuffleState,
    /// The epoch that reads the shards that the epoch before it did not read, if the open shards or those that follow are
    /// of this epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) complement: Option<u64>,
}

/// An open shard and the position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OpenPass {
    #[serde(flatten)]
    pub(crate) pass: ShardPass,
    /// Samples read from the shard.
    pub(crate) taken: u64,
    /// Samples selected from the shard.
    #[serde(rename = "chosen")]
    pub(crate) selected: u64,
}

/// A sample, by [`ShardPass::id`] and its number in the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub(crate) struct SampleRef {
    pub(crate) pass: u64,
    pub(crate) index: u64,
}

impl From<(u64, u64)> for SampleRef {
    fn from((pass, index): (u64, u64)) -> Self {
        Self { pass, index }
    }
}

impl From<SampleRef> for (u64, u64) {
    fn from(sample: SampleRef) -> Self {
        (sample.pass, sample.index)
    }
}

/// Counts of a shard whose samples may still come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ShardProgress {
    pub(crate) shard: usize,
    pub(crate) epoch: u64,
    /// Samples left out before the shuffle, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) left_out: BTreeMap<String, u64>,
    /// Selected samples that were drawn from the shuffle buffer.
    #[serde(rename = "through")]
    pub(crate) drawn: u64,
    /// Drawn samples that failed to decode, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) undecodable: BTreeMap<String, u64>,
    /// Set once the shard was read: how many samples were selected, and the fault of the tar.
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
    /// Fingerprint of the settings that select samples: filter, image and caption keys.
    pub(crate) selection: String,
}

/// The error for a cursor of another stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the saved position in the data is that of a run with {field} = {saved}, and now it is {now}\n  \
         restore the setting, or begin a new run: with another train.output, or with checkpoint.resume = \"never\""
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
            state: OrderState::default(),
            buffer: Vec::new(),
            shards: BTreeMap::new(),
        }
    }

    /// Refuses a cursor of another stream, naming the first setting that differs.
    pub(crate) fn check(&self, now: &OrderIdentity) -> Result<(), CursorMismatch> {
        let saved = &self.identity;
        let optional = |value: &Option<u64>| value.map_or("unset".to_owned(), |n| n.to_string());
        let order = |order: Order| format!("{order:?}").to_lowercase();
        // A fingerprint, as "4 (e6112a54…)".
        let list = |list: &str| match list.split_once(':') {
            Some((count, hash)) => format!("{count} ({}…)", hash.get(..8).unwrap_or(hash)),
            None => list.to_owned(),
        };
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
            ("shards", list(&saved.shards), list(&now.shards)),
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

impl Cursor {
    /// The fault of a cursor that no stream of `shards` shards writes.
    pub(crate) fn fault(&self, shards: usize) -> Option<String> {
        let open = self.state.open.iter().map(|open| &open.pass);
        let begun = open.clone().map(|pass| (pass.id, pass.shard));
        let named = self.shards.iter();
        let named = named.map(|(&id, progress)| (id, progress.shard));
        for (id, shard) in begun.chain(named) {
            if shard >= shards {
                return Some(format!("it names shard {shard} of {shards}"));
            }
            if id >= self.state.passes {
                let passes = self.state.passes;
                return Some(format!("it names shard pass {id} of {passes}"));
            }
        }
        let mut ids = BTreeSet::new();
        if let Some(twice) = open.map(|pass| pass.id).find(|&id| !ids.insert(id)) {
            return Some(format!("shard pass {twice} is open twice"));
        }
        let mut samples = BTreeSet::new();
        let mut buffer = self.buffer.iter();
        buffer
            .find(|sample| !samples.insert(**sample))
            .map(|SampleRef { pass, index }| {
                format!("it holds sample {index} of shard pass {pass} twice")
            })
    }
}

/// A short hash of a list of texts, preceded by the number of texts.
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
    fn cursor_survives_json_and_stays_small() {
        let mut cursor = Cursor::new(identity(), 4_000_000, 3, 250_000);
        cursor.broken.insert("decode_error".into(), 2);
        let pass = |id| ShardPass {
            id,
            shard: 1200,
            epoch: 3,
        };
        cursor.state.open = (4000..4004)
            .map(|id| OpenPass {
                pass: pass(id),
                taken: 3000,
                selected: 2900,
            })
            .collect();
        for id in 3990..4004 {
            let progress = ShardProgress {
                shard: 1200,
                epoch: 3,
                drawn: 2000,
                done: Some((2900, None)),
                ..ShardProgress::default()
            };
            cursor.shards.insert(id, progress);
        }
        let without_buffer = serde_json::to_string(&cursor).unwrap().len();
        assert!(without_buffer < 3 << 10, "{without_buffer}");
        cursor.buffer = (0..1000)
            .map(|n| SampleRef {
                pass: 3990 + n % 14,
                index: 2000 + n,
            })
            .collect();
        let text = serde_json::to_string(&cursor).unwrap();
        assert!(text.len() - without_buffer <= 12 * 1000, "{}", text.len());
        assert_eq!(serde_json::from_str::<Cursor>(&text).unwrap(), cursor);
    }

    #[test]
    fn cursor_mismatch_names_the_setting() {
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
        assert!(mismatch.to_string().contains("shards = 2 ("), "{mismatch}");
        assert!(mismatch.to_string().contains("now it is 3 ("), "{mismatch}");
    }

    #[test]
    fn fingerprint_tells_lists_apart() {
        assert_ne!(fingerprint(["ab", "c"]), fingerprint(["a", "bc"]));
        assert_eq!(fingerprint(["ab", "c"]), fingerprint(["ab", "c"]));
    }
}
