//! The cursor: a position in the stream, small enough to be part of a checkpoint.

mod stored;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::plan::Order;
use super::schedule::{SchedulePosition, ShardPass};
use super::shuffle::ShuffleState;
use stored::StoredCursor;

/// Version of the cursor's format.
const VERSION: u32 = 3;

/// A position in the stream: right after a batch. Resuming from it gives exactly the batches that
/// would have followed. Only open shards and shards with samples in the shuffle buffers are read again.
///
/// The cursor holds everything the order depends on, so that resuming with other settings is refused.
/// Decode threads, batch size, prefetching and the processes that read the lanes may differ.
///
/// As JSON it takes a few hundred bytes for each lane, and about ten for each sample in the shuffle buffers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredCursor")]
pub struct Cursor {
    version: u32,
    identity: OrderIdentity,
    /// Batches of the round that were taken, 0 between rounds.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) taken: usize,
    /// Positions in the lanes, in the order of the lanes: all of the stream, or those of a process.
    lanes: Vec<LaneCursor>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A position in a lane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct LaneCursor {
    /// The lane.
    #[serde(default)]
    pub(crate) lane: usize,
    /// Samples drawn from the shuffle buffer up to the batch's last, which is counted, as are broken samples.
    pub(crate) position: u64,
    /// Epoch of the batch's last sample, from 0.
    pub(crate) epoch: u64,
    /// Index of the lane's batch that follows.
    pub(crate) next_batch: u64,
    /// Broken samples so far, by reason.
    pub(crate) broken: BTreeMap<String, u64>,
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
    pub(crate) lanes: usize,
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
    /// The position in one lane.
    pub(crate) fn in_lane(identity: OrderIdentity, lane: LaneCursor) -> Self {
        Self::in_lanes(identity, vec![lane], 0)
    }

    /// The position in several lanes, in their order, after `taken` batches of a round.
    pub(crate) fn in_lanes(identity: OrderIdentity, lanes: Vec<LaneCursor>, taken: usize) -> Self {
        Self {
            version: VERSION,
            identity,
            taken,
            lanes,
        }
    }

    /// The position of a stream whose lanes several processes read: those of each of `parts`, taken after the same round.
    ///
    /// # Errors
    /// A message, for parts of several streams, and for a lane that several parts or none hold.
    pub fn join(parts: impl IntoIterator<Item = Self>) -> Result<Self, String> {
        let mut parts = parts.into_iter();
        let mut joined = parts.next().ok_or("there is no position to join")?;
        for part in parts {
            if (&part.identity, part.taken) != (&joined.identity, joined.taken) {
                return Err("positions of two streams".to_owned());
            }
            joined.lanes.extend(part.lanes);
        }
        joined.lanes.sort_by_key(|lane| lane.lane);
        let lanes = joined.lanes.iter().map(|lane| lane.lane);
        if !lanes.clone().eq(0..joined.lane_count()) {
            let (lanes, count) = (lanes.collect::<Vec<_>>(), joined.lane_count());
            return Err(format!("positions in the lanes {lanes:?} of {count}"));
        }
        Ok(joined)
    }

    /// Lanes of the stream.
    #[must_use]
    pub fn lane_count(&self) -> usize {
        self.identity.lanes
    }

    /// The position in a lane.
    pub(crate) fn lane(&self, lane: usize) -> Option<&LaneCursor> {
        self.lanes.iter().find(|at| at.lane == lane)
    }

    /// The position in the only lane of a stream of one lane.
    pub(crate) fn into_lane(self) -> Option<LaneCursor> {
        self.lanes.into_iter().next()
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
            ("seed", saved.seed.to_string(), now.seed.to_string()),
            ("lanes", saved.lanes.to_string(), now.lanes.to_string()),
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
    /// The fault of a cursor that no stream of `shards` shards writes, or that lacks one of `lanes`.
    pub(crate) fn fault(&self, shards: usize, mut lanes: Range<usize>) -> Option<String> {
        if let Some(missing) = lanes.find(|&lane| self.lane(lane).is_none()) {
            return Some(format!("it lacks lane {missing}"));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.lanes.iter().find(|at| !seen.insert(at.lane)) {
            return Some(format!("it holds lane {} twice", twice.lane));
        }
        self.lanes.iter().find_map(|lane| lane.fault(shards))
    }
}

impl LaneCursor {
    fn fault(&self, shards: usize) -> Option<String> {
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
            lanes: 2,
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
        let mut lane = LaneCursor {
            lane: 1,
            position: 4_000_000,
            epoch: 3,
            next_batch: 250_000,
            ..LaneCursor::default()
        };
        lane.broken.insert("decode_error".into(), 2);
        let pass = |id| ShardPass {
            id,
            shard: 1200,
            epoch: 3,
        };
        lane.state.open = (4000..4004)
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
            lane.shards.insert(id, progress);
        }
        let cursor = |lane: &LaneCursor| Cursor::in_lane(identity(), lane.clone());
        let without_buffer = serde_json::to_string(&cursor(&lane)).unwrap().len();
        assert!(without_buffer < 3 << 10, "{without_buffer}");
        lane.buffer = (0..1000)
            .map(|n| SampleRef {
                pass: 3990 + n % 14,
                index: 2000 + n,
            })
            .collect();
        let text = serde_json::to_string(&cursor(&lane)).unwrap();
        assert!(text.len() - without_buffer <= 12 * 1000, "{}", text.len());
        assert_eq!(
            serde_json::from_str::<Cursor>(&text).unwrap(),
            cursor(&lane)
        );
    }

    #[test]
    fn cursor_of_version_2_is_that_of_one_lane() {
        let stored = r#"{"version":2,"identity":{"seed":1,"rank":0,"world":1,"order":"shuffled","resample":true,"open_shards":4,
            "shuffle_buffer":1000,"shuffle_buffer_mb":256,"max_samples":null,"shards":"2:ab","selection":"1:cd"},
            "position":9,"epoch":0,"next_batch":3,"broken":{},"place":{"epoch":0,"accepted":9,
            "open":[{"id":0,"shard":1,"epoch":0,"taken":9,"chosen":9}],"turn":0,"next":{"epoch":0,"index":1},"visits":1,"read":9,
            "shuffle":{"draws":9,"filling":false}},"buffer":[[0,7]],"visits":{"0":{"shard":1,"epoch":0,"through":8}}}"#;
        let cursor: Cursor = serde_json::from_str(stored).unwrap();
        assert_eq!((cursor.lane_count(), cursor.fault(2, 0..1)), (1, None));
        let lane = cursor.lane(0).unwrap();
        assert_eq!(
            (lane.position, lane.next_batch, lane.shards[&0].drawn),
            (9, 3, 8)
        );
        let text = serde_json::to_string(&cursor).unwrap();
        assert!(
            text.starts_with(r#"{"version":3,"identity":{"seed":1,"lanes":1,"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Cursor>(&text).unwrap(), cursor);
        let refused = |text: String| {
            serde_json::from_str::<Cursor>(&text)
                .unwrap_err()
                .to_string()
        };
        let newer = refused(text.replace(r#""version":3"#, r#""version":4"#));
        assert!(newer.contains("version 4"), "{newer}");
        let damaged = refused(stored.replace(r#""next_batch":3,"#, ""));
        assert!(damaged.contains("next_batch"), "{damaged}");
        assert_eq!(cursor.fault(2, 0..2).unwrap(), "it lacks lane 1");
    }

    #[test]
    fn cursor_mismatch_names_the_setting() {
        let cursor = Cursor::in_lane(identity(), LaneCursor::default());
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
                lanes: 4,
                ..identity()
            }),
            "lanes"
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
