//! Going on from a cursor: reads again the shards the order was in the middle of, up to where it
//! was, and of those that were through, the samples that were still in the shuffle buffer.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::order::{Cursor, OpenVisit, SampleRef, Visit};

use super::error::StreamError;
use super::interleave::{Interleaver, Slot, Stop};
use super::reader::{OpenShard, ShardEvent};
use super::step::Chosen;

/// What is to be had of one shard.
struct Wanted {
    visit: Visit,
    /// Samples that were in the buffer, by their number in the shard.
    samples: BTreeSet<u64>,
    /// The place in it, if it was not through.
    open: Option<OpenVisit>,
}

impl Wanted {
    /// How many samples are to be read.
    fn until(&self) -> u64 {
        let last = self.samples.last().map_or(0, |last| last + 1);
        self.open.map_or(last, |open| open.taken.max(last))
    }
}

fn wanted(cursor: &Cursor, shards: usize) -> Result<Vec<Wanted>, StreamError> {
    let damaged = |what: String| {
        StreamError::Config(format!("the saved place in the data is damaged: {what}"))
    };
    let mut wanted: BTreeMap<u64, Wanted> = cursor
        .place
        .open
        .iter()
        .map(|open| {
            let wanted = Wanted {
                visit: open.visit,
                samples: BTreeSet::new(),
                open: Some(*open),
            };
            (open.visit.id, wanted)
        })
        .collect();
    for sample in &cursor.buffer {
        let id = sample.visit;
        let wanted = match wanted.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(through) => {
                let tally = cursor.visits.get(&id).ok_or_else(|| {
                    damaged(format!(
                        "it holds a sample of shard reading {id}, and does not say of which shard"
                    ))
                })?;
                through.insert(Wanted {
                    visit: Visit {
                        id,
                        shard: tally.shard,
                        epoch: tally.epoch,
                    },
                    samples: BTreeSet::new(),
                    open: None,
                })
            }
        };
        wanted.samples.insert(sample.index);
    }
    match wanted.values().find(|wanted| wanted.visit.shard >= shards) {
        Some(Wanted { visit, .. }) => Err(damaged(format!(
            "it names shard {} of {shards}",
            visit.shard
        ))),
        None => Ok(wanted.into_values().collect()),
    }
}

impl Interleaver {
    /// Puts open shards and the shuffle buffer back as `cursor` has them.
    pub(super) fn restore(&mut self, cursor: &Cursor) -> Result<(), Stop> {
        let wanted = wanted(cursor, self.config.shards.len()).map_err(Stop::Failed)?;
        let mut samples = HashMap::new();
        let mut opened = VecDeque::new();
        let mut to_open = wanted.iter();
        for wanted in &wanted {
            while opened.len() <= self.config.open_shards
                && let Some(next) = to_open.next()
            {
                opened.push_back(self.open(next.visit.shard)?);
            }
            let Some(shard) = opened.pop_front() else {
                break;
            };
            self.reread(wanted, &shard, &mut samples)?;
            if let Some(at) = wanted.open {
                self.slots.push(Slot { at, shard });
            }
        }
        // Their order is part of the place.
        let order: HashMap<u64, usize> = cursor
            .place
            .open
            .iter()
            .enumerate()
            .map(|(order, open)| (open.visit.id, order))
            .collect();
        self.slots
            .sort_by_key(|slot| order.get(&slot.at.visit.id).copied());
        let items = cursor
            .buffer
            .iter()
            .filter_map(|sample| samples.remove(sample))
            .map(|chosen| {
                let bytes = chosen.members.bytes() as u64;
                (chosen, bytes)
            })
            .collect();
        self.buffer.restore(cursor.place.shuffle, items);
        Ok(())
    }

    fn reread(
        &mut self,
        wanted: &Wanted,
        shard: &OpenShard,
        samples: &mut HashMap<SampleRef, Chosen>,
    ) -> Result<(), Stop> {
        let changed = |context: &Self, sample| {
            Stop::Failed(StreamError::ShardChanged {
                url: context.config.shards[wanted.visit.shard].redacted(),
                sample,
            })
        };
        for index in 0..wanted.until() {
            let sample = match self.next_event(shard)? {
                ShardEvent::Sample(sample) => sample,
                ShardEvent::End { .. } => return Err(changed(self, index)),
                ShardEvent::Failed(error) => return Err(Stop::Failed(error)),
            };
            if wanted.samples.contains(&index) {
                let chosen = self
                    .choose(wanted.visit, index, sample)
                    .map_err(|_| changed(self, index))?;
                let visit = wanted.visit.id;
                samples.insert(SampleRef { visit, index }, chosen);
            }
        }
        Ok(())
    }
}
