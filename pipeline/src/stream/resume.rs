//! Resume: re-reads the open shards up to the cursor, and finished shards only for their samples in the shuffle buffer.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::error::{Halt, StreamError};
use super::event::SelectedSample;
use super::kinds::SampleKind;
use super::reader::{OpenShard, ShardEvent};
use super::select::SampleSelector;
use super::shards::{OpenSlot, ShardOpener};
use crate::order::{LaneCursor, OpenPass, SampleRef, ShardPass};

/// State of the interleaver that is read again from the shards.
pub(super) struct Reread<K: SampleKind> {
    /// The open shards, in the order of the cursor.
    pub(super) slots: Vec<OpenSlot>,
    /// Contents of the shuffle buffer, in the buffer's order.
    pub(super) buffer: Vec<SelectedSample<K>>,
}

/// Samples that are needed from one shard.
struct NeededShard {
    pass: ShardPass,
    /// Samples that were in the buffer, by their number in the shard.
    samples: BTreeSet<u64>,
    /// The position in the shard, if it was open.
    open: Option<OpenPass>,
}

impl NeededShard {
    /// Number of samples to read.
    fn until(&self) -> u64 {
        let last = self.samples.last().map_or(0, |last| last + 1);
        self.open.map_or(last, |open| open.taken.max(last))
    }
}

/// The shards that `cursor` needs, in the order of their passes.
fn needed_shards(cursor: &LaneCursor) -> Result<Vec<NeededShard>, StreamError> {
    let open = cursor.state.open.iter().map(|open| {
        let needed = NeededShard {
            pass: open.pass,
            samples: BTreeSet::new(),
            open: Some(*open),
        };
        (open.pass.id, needed)
    });
    let mut needed: BTreeMap<u64, NeededShard> = open.collect();
    for sample in &cursor.buffer {
        let id = sample.pass;
        let shard = match needed.entry(id) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(finished) => {
                let progress = cursor.shards.get(&id).ok_or_else(|| {
                    StreamError::Config(format!(
                        "the saved position in the data is damaged: it holds a sample of shard pass {id}, and does not name the shard"
                    ))
                })?;
                finished.insert(NeededShard {
                    pass: ShardPass {
                        id,
                        shard: progress.shard,
                        epoch: progress.epoch,
                    },
                    samples: BTreeSet::new(),
                    open: None,
                })
            }
        };
        shard.samples.insert(sample.index);
    }
    Ok(needed.into_values().collect())
}

/// Re-reads the open shards and the contents of the shuffle buffer at `cursor`. At most `open_shards` shards are
/// opened ahead.
pub(super) fn reread<K: SampleKind>(
    cursor: &LaneCursor,
    opener: &ShardOpener,
    selector: &mut SampleSelector<K>,
    open_shards: usize,
) -> Result<Reread<K>, Halt> {
    let needed = needed_shards(cursor).map_err(Halt::Failed)?;
    let mut samples = HashMap::new();
    let mut slots = Vec::new();
    let mut opened = VecDeque::new();
    let mut to_open = needed.iter();
    for needed in &needed {
        while opened.len() <= open_shards
            && let Some(next) = to_open.next()
        {
            opened.push_back(opener.open(next.pass.shard)?);
        }
        let Some(shard) = opened.pop_front() else {
            break;
        };
        reread_shard(needed, &shard, opener, selector, &mut samples)?;
        if let Some(at) = needed.open {
            slots.push(OpenSlot { at, shard });
        }
    }
    // Samples are taken from the open shards in this order.
    let order: HashMap<u64, usize> = cursor
        .state
        .open
        .iter()
        .enumerate()
        .map(|(order, open)| (open.pass.id, order))
        .collect();
    slots.sort_by_key(|slot| order.get(&slot.at.pass.id).copied());
    let buffer = cursor
        .buffer
        .iter()
        .filter_map(|sample| samples.remove(sample))
        .collect();
    Ok(Reread { slots, buffer })
}

/// Reads the needed samples of one shard.
fn reread_shard<K: SampleKind>(
    needed: &NeededShard,
    shard: &OpenShard,
    opener: &ShardOpener,
    selector: &mut SampleSelector<K>,
    samples: &mut HashMap<SampleRef, SelectedSample<K>>,
) -> Result<(), Halt> {
    let changed = |sample| {
        Halt::Failed(StreamError::ShardChanged {
            url: opener.url(needed.pass.shard),
            sample,
        })
    };
    for index in 0..needed.until() {
        let sample = match opener.next_event(shard)? {
            ShardEvent::Sample(sample) => sample,
            ShardEvent::NonSample(_) => continue,
            ShardEvent::End { .. } => return Err(changed(index)),
            ShardEvent::Failed(error) => return Err(Halt::Failed(error)),
        };
        if needed.samples.contains(&index) {
            let selected = selector
                .select(needed.pass, index, &sample)
                .map_err(|_| changed(index))?;
            let pass = needed.pass.id;
            samples.insert(SampleRef { pass, index }, selected);
        }
    }
    Ok(())
}
