//! The order thread: which shard is read next, which sample comes next, which are left out.
//!
//! Everything the order depends on is decided here, by one thread, from the plan and the samples
//! alone. Shards are opened ahead of their turn, which changes nothing but speed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::flow::{Closed, OrderedSender, StageHandle};
use crate::order::{
    Capacity, Drawn, OpenVisit, Order, Place, SampleRef, Schedule, ShuffleBuffer, Turn, Visit,
};
use crate::panic::panic_message;
use crate::shard::{FilterState, Sample};
use crate::stages::Stage;

use super::config::StreamConfig;
use super::error::StreamError;
use super::reader::{OpenShard, ReaderContext, ShardEvent};
use super::step::{Chosen, Draw, Job, Json, Reason, Step, parse_json};

/// After so many samples without one that passes, a filter whose json key never appeared is an
/// error, and no longer patience.
const HOPELESS_AFTER: u64 = 10_000;

/// Why the thread ends.
pub(super) enum Stop {
    /// The stream is being dropped.
    Closed,
    Failed(StreamError),
}

impl From<Closed> for Stop {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

/// A shard in turn.
pub(super) struct Slot {
    pub(super) at: OpenVisit,
    pub(super) shard: OpenShard,
}

/// A shard that is read already and not yet in turn.
struct Ahead {
    turn: Turn,
    index: usize,
    shard: OpenShard,
}

pub(super) struct Interleaver {
    pub(super) config: StreamConfig,
    pub(super) context: ReaderContext,
    steps: OrderedSender<Job, Step>,
    cancel: CancellationToken,
    schedule: Schedule,
    ahead: VecDeque<Ahead>,
    pub(super) slots: Vec<Slot>,
    filter: FilterState,
    needs_json: bool,
    pub(super) buffer: ShuffleBuffer<Chosen>,
    /// Put into the buffer since the last draw.
    pushed: Vec<SampleRef>,
    filtering: StageHandle,
    shuffling: StageHandle,
    /// Samples drawn so far; the next one's position.
    position: u64,
    /// As in [`Place`].
    epoch: u64,
    accepted: u64,
    turn: usize,
    visits: u64,
    read: u64,
    passed_any: bool,
}

impl Interleaver {
    pub(super) fn new(
        config: StreamConfig,
        context: ReaderContext,
        steps: OrderedSender<Job, Step>,
        cancel: CancellationToken,
    ) -> Self {
        let items = match config.order {
            Order::Shuffled => config.shuffle_buffer,
            Order::Sequential => 0,
        };
        let bytes = config.shuffle_buffer_mb.saturating_mul(1_000_000);
        let (position, place) = config.resume.as_ref().map_or_else(
            || (0, Place::default()),
            |cursor| (cursor.position, cursor.place.clone()),
        );
        Self {
            schedule: Schedule::new(config.plan(), place.next),
            ahead: VecDeque::new(),
            slots: Vec::new(),
            filter: FilterState::new(config.filter.clone()),
            needs_json: config.filter.needs_json(),
            buffer: ShuffleBuffer::new(config.seed, Capacity { items, bytes }),
            pushed: Vec::new(),
            filtering: context.metrics.stage(Stage::Filter),
            shuffling: context.metrics.stage(Stage::Shuffle),
            position,
            epoch: place.epoch,
            accepted: place.accepted,
            turn: place.turn,
            visits: place.visits,
            read: place.read,
            passed_any: position > 0,
            config,
            context,
            steps,
            cancel,
        }
    }

    pub(super) fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.epochs())).unwrap_or_else(|payload| {
            Err(Stop::Failed(StreamError::Panicked {
                stage: Stage::Shuffle,
                message: panic_message(payload.as_ref()),
            }))
        });
        if let Err(Stop::Failed(error)) = result {
            let _closed = self.pass(Step::Failed(error));
        }
    }

    fn epochs(&mut self) -> Result<(), Stop> {
        match self.config.resume.take() {
            Some(cursor) => self.restore(&cursor)?,
            None => self.begin_epoch()?,
        }
        loop {
            self.finish_epoch()?;
            if self.config.order == Order::Sequential {
                return Ok(());
            }
            (self.epoch, self.accepted, self.turn) = (self.epoch + 1, 0, 0);
            self.begin_epoch()?;
        }
    }

    fn begin_epoch(&mut self) -> Result<(), Stop> {
        let width = match self.config.order {
            Order::Shuffled => self.config.open_shards,
            Order::Sequential => 1,
        };
        while self.slots.len() < width
            && let Some(slot) = self.begin_shard()?
        {
            self.slots.push(slot);
        }
        Ok(())
    }

    /// Reads the epoch to its end from where it stands.
    fn finish_epoch(&mut self) -> Result<(), Stop> {
        let share = self.config.epoch_share();
        // A place can lie between two draws.
        self.relieve()?;
        while !self.slots.is_empty() && share.is_none_or(|share| self.accepted < share) {
            let turn = self.turn % self.slots.len();
            match self.next_event(&self.slots[turn].shard)? {
                ShardEvent::Sample(sample) => self.sample(turn, sample)?,
                ShardEvent::End { broken } => {
                    // The one that follows takes its place and its turn.
                    self.turn = turn;
                    let ended = match self.begin_shard()? {
                        Some(next) => std::mem::replace(&mut self.slots[turn], next),
                        None => self.slots.remove(turn),
                    };
                    self.end_shard(ended, broken)?;
                }
                ShardEvent::Failed(error) => return Err(Stop::Failed(error)),
            }
        }
        // What max_samples leaves of the epoch is not read.
        self.schedule.skip_rest_of(self.epoch);
        self.ahead.retain(|ahead| ahead.turn.epoch != self.epoch);
        for slot in std::mem::take(&mut self.slots) {
            self.end_shard(slot, None)?;
        }
        // With replacement, epochs have no meaning to keep apart.
        let continuous = self.config.order == Order::Shuffled && self.config.resample;
        while !continuous && !self.buffer.is_empty() {
            self.draw()?;
        }
        self.pass(Step::EpochDone { read: self.read })?;
        if self.accepted == 0 {
            return Err(self.nothing_usable());
        }
        Ok(())
    }

    fn nothing_usable(&self) -> Stop {
        Stop::Failed(StreamError::NothingUsable {
            report: self.filter.report(),
            shards: Vec::new(),
            skipped: Vec::new(),
        })
    }

    /// The next shard of the epoch, opened; keeps others opening behind it.
    fn begin_shard(&mut self) -> Result<Option<Slot>, Stop> {
        let lookahead = match self.config.order {
            Order::Shuffled => 1,
            Order::Sequential => self.config.open_shards,
        };
        while self.ahead.len() < lookahead + 1 {
            let Some((turn, index)) = self.schedule.next() else {
                break;
            };
            let shard = self.open(index)?;
            self.ahead.push_back(Ahead { turn, index, shard });
        }
        let Some(ahead) = self
            .ahead
            .pop_front_if(|ahead| ahead.turn.epoch == self.epoch)
        else {
            return Ok(None);
        };
        let visit = Visit {
            id: self.visits,
            shard: ahead.index,
            epoch: self.epoch,
        };
        self.visits += 1;
        Ok(Some(Slot {
            at: OpenVisit {
                visit,
                taken: 0,
                chosen: 0,
            },
            shard: ahead.shard,
        }))
    }

    pub(super) fn open(&self, index: usize) -> Result<OpenShard, Stop> {
        OpenShard::start(&self.context, &self.config.shards[index])
            .map_err(|error| Stop::Failed(StreamError::threads(&error)))
    }

    pub(super) fn next_event(&self, shard: &OpenShard) -> Result<ShardEvent, Stop> {
        let start = Instant::now();
        let event = shard.next(&self.cancel);
        // One thread is both stages: they wait together.
        let waited = start.elapsed();
        self.filtering.add_starved(waited);
        self.shuffling.add_starved(waited);
        if self.cancel.is_cancelled() {
            return Err(Stop::Closed);
        }
        event.ok_or_else(|| {
            Stop::Failed(StreamError::Panicked {
                stage: Stage::Untar,
                message: "the shard's thread ended without a word".to_owned(),
            })
        })
    }

    /// Filters and shuffles one sample of the shard in `turn`.
    fn sample(&mut self, turn: usize, sample: Sample) -> Result<(), Stop> {
        let at = &mut self.slots[turn].at;
        let (visit, index) = (at.visit, at.taken);
        at.taken += 1;
        self.turn = turn + 1;
        let filtering = self.filtering.clone();
        let chosen = filtering.work(|| self.choose(visit, index, sample));
        filtering.add_items(1);
        match chosen {
            Ok(chosen) => {
                self.read += 1;
                self.accepted += 1;
                self.passed_any = true;
                self.slots[turn].at.chosen += 1;
                self.pushed.push(SampleRef {
                    visit: visit.id,
                    index,
                });
                let bytes = chosen.members.bytes() as u64;
                if self.shuffling.work(|| self.buffer.push(chosen, bytes)) {
                    self.draw()?;
                }
                self.relieve()
            }
            Err((key, reason)) => {
                self.read += u64::from(reason.is_broken());
                let name = reason.name();
                self.filter.count(&name);
                self.context.metrics.skip(&name);
                let url = self.config.shards[visit.shard].redacted();
                tracing::debug!(shard = %url, %key, reason = %name, "sample left out");
                self.pass(Step::LeftOut {
                    visit,
                    key,
                    reason,
                    read: self.read,
                })?;
                if !self.passed_any && self.filter.lacks_a_key_after(HOPELESS_AFTER) {
                    return Err(self.nothing_usable());
                }
                Ok(())
            }
        }
    }

    pub(super) fn choose(
        &mut self,
        visit: Visit,
        index: u64,
        sample: Sample,
    ) -> Result<Chosen, (std::sync::Arc<str>, Reason)> {
        self.filter.saw();
        let key = sample.key.clone();
        let left_out = |reason| (key.clone(), reason);
        let config = &self.config;
        let members = config.members(&sample).map_err(left_out)?;
        let caption = config.caption(&sample).map_err(left_out)?;
        let raw = sample.members.get("json");
        let json = match raw {
            None => Json::None,
            Some(raw) if self.needs_json => match parse_json(raw) {
                Some(json) => Json::Parsed(json),
                None => return Err(left_out(Reason::BAD_JSON)),
            },
            Some(raw) => Json::Raw(raw.clone()),
        };
        let parsed = match &json {
            Json::Parsed(value) => Some(value),
            Json::None | Json::Raw(_) => None,
        };
        self.filter
            .check(parsed, &caption)
            .map_err(|rejection| left_out(Reason::Filtered(rejection)))?;
        Ok(Chosen {
            visit,
            key: key.clone(),
            index,
            members,
            caption,
            json,
        })
    }

    /// Draws until the buffer holds no more bytes than it should.
    fn relieve(&mut self) -> Result<(), Stop> {
        while self.buffer.is_overfull() {
            self.draw()?;
        }
        Ok(())
    }

    /// Draws a sample from the buffer and sends it on its way.
    fn draw(&mut self) -> Result<(), Stop> {
        let Some(Drawn { item, slot }) = self.shuffling.work(|| self.buffer.draw()) else {
            return Ok(());
        };
        self.shuffling.add_items(1);
        let draw = Draw {
            pushed: std::mem::take(&mut self.pushed),
            slot,
            place: self.place(),
        };
        let job = Job {
            chosen: item,
            position: self.position,
            draw: Box::new(draw),
        };
        self.position += 1;
        let start = Instant::now();
        let sent = self.steps.send(job, &self.shuffling);
        self.filtering.add_blocked(start.elapsed());
        Ok(sent?)
    }

    /// Where the order stands.
    fn place(&self) -> Place {
        Place {
            epoch: self.epoch,
            accepted: self.accepted,
            open: self.slots.iter().map(|slot| slot.at).collect(),
            turn: self.turn,
            next: self
                .ahead
                .front()
                .map_or_else(|| self.schedule.turn(), |ahead| ahead.turn),
            visits: self.visits,
            read: self.read,
            shuffle: self.buffer.state(),
        }
    }

    fn end_shard(&mut self, slot: Slot, broken: Option<String>) -> Result<(), Stop> {
        let OpenVisit { visit, chosen, .. } = slot.at;
        if let Some(cause) = &broken {
            let url = self.config.shards[visit.shard].redacted();
            tracing::warn!(shard = %url, cause, "broken shard: what came before the fault is used");
            self.context.metrics.skip("broken_shard");
        }
        self.pass(Step::ShardDone {
            visit,
            chosen,
            broken,
        })
    }

    fn pass(&self, step: Step) -> Result<(), Stop> {
        let start = Instant::now();
        let sent = self.steps.pass(step, &self.shuffling);
        self.filtering.add_blocked(start.elapsed());
        Ok(sent?)
    }
}
