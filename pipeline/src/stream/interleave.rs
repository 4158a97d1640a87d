//! The order thread: which shard is read next, which sample comes next, which are left out.
//!
//! Everything the order depends on is decided here, by one thread, from the plan and the samples
//! alone. Shards are opened ahead of their turn, which changes nothing but speed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::flow::{Cancel, Closed, OrderedSender, Stage, StageHandle, panic_message};
use crate::order::{EpochPlan, Order, ShuffleBuffer};
use crate::shard::{FilterState, Sample};

use super::config::StreamConfig;
use super::error::StreamError;
use super::reader::{OpenShard, ReaderContext, ShardEvent};
use super::step::{Chosen, Job, Json, Reason, Step, Visit, parse_json};

/// After so many samples without one that passes, a filter whose json key never appeared is an
/// error, and no longer patience.
const HOPELESS_AFTER: u64 = 10_000;

/// Why the thread ends.
enum Stop {
    /// The stream is being dropped.
    Closed,
    Failed(StreamError),
    /// All was read.
    Finished,
}

impl From<Closed> for Stop {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

struct Slot {
    visit: Visit,
    shard: OpenShard,
    /// Samples taken from it, and how many of them were chosen.
    taken: u64,
    chosen: u64,
}

/// Shards in the order they are to be opened, epoch after epoch.
struct Schedule {
    plan: EpochPlan,
    epoch: u64,
    queue: VecDeque<usize>,
    opened: u64,
}

impl Schedule {
    fn new(plan: EpochPlan) -> Self {
        Self {
            plan,
            epoch: 0,
            queue: plan.shards(0).into(),
            opened: 0,
        }
    }

    fn next(&mut self) -> Option<Visit> {
        if self.queue.is_empty() {
            self.next_epoch()?;
        }
        let visit = Visit {
            id: self.opened,
            shard: self.queue.pop_front()?,
            epoch: self.epoch,
        };
        self.opened += 1;
        Some(visit)
    }

    fn next_epoch(&mut self) -> Option<()> {
        if self.plan.order == Order::Sequential {
            return None;
        }
        self.epoch += 1;
        self.queue = self.plan.shards(self.epoch).into();
        Some(())
    }

    /// Drops what is left of `epoch`.
    fn skip_rest_of(&mut self, epoch: u64) {
        if self.epoch == epoch {
            self.queue.clear();
        }
    }
}

pub(super) struct Interleaver {
    config: StreamConfig,
    context: ReaderContext,
    steps: OrderedSender<Job, Step>,
    cancel: Cancel,
    schedule: Schedule,
    /// Opened and not yet in turn.
    ahead: VecDeque<Slot>,
    filter: FilterState,
    needs_json: bool,
    buffer: ShuffleBuffer<Chosen>,
    filtering: StageHandle,
    shuffling: StageHandle,
    /// Samples drawn so far; the next one's position.
    position: u64,
    /// Where the stream goes on: what comes before is passed over.
    resume_at: u64,
    read: u64,
    passed_any: bool,
}

impl Interleaver {
    pub(super) fn new(
        config: StreamConfig,
        context: ReaderContext,
        steps: OrderedSender<Job, Step>,
        cancel: Cancel,
    ) -> Self {
        let buffer = match config.order {
            Order::Shuffled => config.shuffle_buffer,
            Order::Sequential => 0,
        };
        Self {
            schedule: Schedule::new(config.plan()),
            ahead: VecDeque::new(),
            filter: FilterState::new(config.filter.clone()),
            needs_json: config.filter.needs_json(),
            buffer: ShuffleBuffer::new(config.seed, buffer),
            filtering: context.metrics.stage(Stage::Filter),
            shuffling: context.metrics.stage(Stage::Shuffle),
            position: 0,
            resume_at: config.resume.as_ref().map_or(0, |cursor| cursor.position),
            read: 0,
            passed_any: false,
            config,
            context,
            steps,
            cancel,
        }
    }

    pub(super) fn run(mut self) {
        let stop = catch_unwind(AssertUnwindSafe(|| self.epochs())).unwrap_or_else(|payload| {
            Stop::Failed(StreamError::Panicked {
                stage: Stage::Shuffle,
                message: panic_message(payload.as_ref()),
            })
        });
        if let Stop::Failed(error) = stop {
            let _closed = self.pass(Step::Failed(error));
        }
    }

    fn epochs(&mut self) -> Stop {
        for epoch in 0.. {
            match self.epoch(epoch) {
                Ok(()) if self.config.order == Order::Sequential => return Stop::Finished,
                Ok(()) => {}
                Err(stop) => return stop,
            }
        }
        Stop::Finished
    }

    fn epoch(&mut self, epoch: u64) -> Result<(), Stop> {
        let width = match self.config.order {
            Order::Shuffled => self.config.open_shards,
            Order::Sequential => 1,
        };
        let share = self.config.epoch_share();
        let mut accepted = 0_u64;
        let mut slots: Vec<Slot> = Vec::with_capacity(width);
        while slots.len() < width
            && let Some(slot) = self.take(epoch)?
        {
            slots.push(slot);
        }
        let mut turn = 0;
        while !slots.is_empty() && share.is_none_or(|share| accepted < share) {
            turn %= slots.len();
            match self.next_event(&slots[turn])? {
                ShardEvent::Sample(sample) => {
                    accepted += u64::from(self.sample(&mut slots[turn], sample)?);
                    turn += 1;
                }
                ShardEvent::End { broken } => {
                    let finished = match self.take(epoch)? {
                        Some(next) => std::mem::replace(&mut slots[turn], next),
                        None => slots.remove(turn),
                    };
                    self.finish(finished, broken)?;
                }
                ShardEvent::Failed(error) => return Err(Stop::Failed(error)),
                // Nobody asked for notes.
                ShardEvent::PassedOver(_) | ShardEvent::Trailing(_) => {}
            }
        }
        // What max_samples leaves of the epoch is not read.
        self.schedule.skip_rest_of(epoch);
        self.ahead.retain(|slot| slot.visit.epoch != epoch);
        for slot in slots {
            self.finish(slot, None)?;
        }
        // With replacement, epochs have no meaning to keep apart.
        let continuous = self.config.order == Order::Shuffled && self.config.resample;
        while !continuous && self.buffer.len() > 0 {
            let drawn = self.shuffling.work(|| self.buffer.draw());
            self.emit(drawn)?;
        }
        self.pass(Step::EpochDone { read: self.read })?;
        if accepted == 0 {
            return Err(self.nothing_usable());
        }
        Ok(())
    }

    fn nothing_usable(&self) -> Stop {
        Stop::Failed(StreamError::NothingUsable {
            report: self.filter.report(),
        })
    }

    /// The next shard of `epoch`, opened; keeps others opening behind it.
    fn take(&mut self, epoch: u64) -> Result<Option<Slot>, Stop> {
        let lookahead = match self.config.order {
            Order::Shuffled => 1,
            Order::Sequential => self.config.open_shards,
        };
        while self.ahead.len() < lookahead + 1 {
            let Some(visit) = self.schedule.next() else {
                break;
            };
            let url = &self.config.shards[visit.shard];
            let shard = OpenShard::start(&self.context, url)
                .map_err(|error| Stop::Failed(StreamError::threads(&error)))?;
            self.ahead.push_back(Slot {
                visit,
                shard,
                taken: 0,
                chosen: 0,
            });
        }
        if self
            .ahead
            .front()
            .is_some_and(|slot| slot.visit.epoch == epoch)
        {
            return Ok(self.ahead.pop_front());
        }
        Ok(None)
    }

    fn next_event(&self, slot: &Slot) -> Result<ShardEvent, Stop> {
        let start = Instant::now();
        let event = slot.shard.next(&self.cancel);
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

    /// Filters and shuffles one sample; whether it was chosen.
    fn sample(&mut self, slot: &mut Slot, sample: Sample) -> Result<bool, Stop> {
        let index = slot.taken;
        slot.taken += 1;
        let filtering = self.filtering.clone();
        let chosen = filtering.work(|| self.choose(slot.visit, index, sample));
        filtering.add_items(1);
        match chosen {
            Ok(chosen) => {
                self.read += 1;
                self.passed_any = true;
                slot.chosen += 1;
                let drawn = self.shuffling.work(|| self.buffer.push(chosen));
                self.emit(drawn)?;
                Ok(true)
            }
            Err((key, reason)) => {
                self.read += u64::from(reason.is_broken());
                let name = reason.name();
                self.filter.count(&name);
                self.context.metrics.skip(&name);
                let url = self.config.shards[slot.visit.shard].redacted();
                tracing::debug!(shard = %url, %key, reason = %name, "sample left out");
                self.pass(Step::LeftOut {
                    visit: slot.visit,
                    reason,
                    read: self.read,
                })?;
                if !self.passed_any && self.filter.lacks_a_key_after(HOPELESS_AFTER) {
                    return Err(self.nothing_usable());
                }
                Ok(false)
            }
        }
    }

    fn choose(
        &mut self,
        visit: Visit,
        index: u64,
        sample: Sample,
    ) -> Result<Chosen, (std::sync::Arc<str>, Reason)> {
        self.filter.saw();
        let key = sample.key.clone();
        let left_out = |reason| (key.clone(), reason);
        let config = &self.config;
        let Some((_, image)) = sample.pick(&config.image_keys) else {
            let oversized = config
                .image_keys
                .iter()
                .any(|key| sample.oversized.contains_key(key));
            return Err(left_out(if oversized {
                Reason::TOO_LARGE
            } else {
                Reason::NO_IMAGE
            }));
        };
        let Some((_, caption)) = sample.pick(&config.caption_keys) else {
            return Err(left_out(Reason::NO_CAPTION));
        };
        let caption = String::from_utf8_lossy(caption).into_owned();
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
            image: image.clone(),
            caption,
            json,
        })
    }

    /// Sends a drawn sample on its way.
    fn emit(&mut self, drawn: Option<Chosen>) -> Result<(), Stop> {
        let Some(chosen) = drawn else {
            return Ok(());
        };
        self.shuffling.add_items(1);
        let position = self.position;
        self.position += 1;
        if position < self.resume_at {
            return self.pass(Step::Passed {
                visit: chosen.visit,
                position,
            });
        }
        let job = Job {
            chosen,
            position,
            read: self.read,
        };
        let start = Instant::now();
        let sent = self.steps.send(job, &self.shuffling);
        self.filtering.add_blocked(start.elapsed());
        Ok(sent?)
    }

    fn finish(&mut self, slot: Slot, broken: Option<String>) -> Result<(), Stop> {
        if let Some(cause) = &broken {
            let url = self.config.shards[slot.visit.shard].redacted();
            tracing::warn!(shard = %url, cause, "broken shard: what came before the fault is used");
            self.context.metrics.skip("broken_shard");
        }
        self.pass(Step::ShardDone {
            visit: slot.visit,
            chosen: slot.chosen,
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
