//! The interleaver: a thread that decides which shard is read next, which sample comes next and which are skipped.
//!
//! Everything the order depends on is decided here, by one thread, from the plan and the samples alone. Shards are
//! opened ahead, which changes only the speed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::flow::{OrderedSender, StageHandle};
use crate::order::{
    Drawn, LaneCursor, OpenPass, Order, OrderState, SampleRef, SchedulePosition, ShardPass,
    ShardSchedule, ShuffleBuffer,
};
use crate::panic::panic_message;
use crate::shard::{FilterReport, Sample};
use crate::stages::Stage;

use super::config::{LaneConfig, StreamConfig};
use super::error::{Halt, StreamError};
use super::event::{DecodeJob, SelectedSample, ShuffleDraw, StreamEvent};
use super::kinds::SampleKind;
use super::reader::{OpenShard, ReaderContext, ShardEvent};
use super::resume::{Reread, reread};
use super::select::{SampleSelector, Unselected};
use super::shards::{OpenSlot, ShardOpener};
use super::skip::SkipExamples;

/// A shard that is read ahead of its turn.
struct PrefetchedShard {
    position: SchedulePosition,
    index: usize,
    shard: OpenShard,
}

pub(super) struct Interleaver<K: SampleKind> {
    lane: usize,
    order: Order,
    resample: bool,
    open_shards: usize,
    epoch_share: Option<u64>,
    resume: Option<LaneCursor>,
    opener: ShardOpener,
    selector: SampleSelector<K>,
    events: OrderedSender<DecodeJob<K>, StreamEvent<K>>,
    schedule: ShardSchedule,
    prefetched: VecDeque<PrefetchedShard>,
    slots: Vec<OpenSlot>,
    buffer: ShuffleBuffer<SelectedSample<K>>,
    /// Samples pushed to the buffer since the last draw.
    pushed: Vec<SampleRef>,
    filtering: StageHandle,
    shuffling: StageHandle,
    /// Samples drawn so far: the next sample's position.
    position: u64,
    /// The fields of [`OrderState`].
    epoch: u64,
    accepted: u64,
    turn: usize,
    passes: u64,
    read: u64,
    /// Whether any sample was selected.
    selected_any: bool,
    /// The first shard that was read whole and holds no sample.
    empty_shard: Option<usize>,
}

impl<K: SampleKind> Interleaver<K> {
    pub(super) fn new(
        kind: K,
        config: &StreamConfig,
        lane: LaneConfig,
        context: ReaderContext,
        events: OrderedSender<DecodeJob<K>, StreamEvent<K>>,
        cancel: CancellationToken,
    ) -> Self {
        let (position, state) = lane.resume.as_ref().map_or_else(
            || (0, OrderState::default()),
            |cursor| (cursor.position, cursor.state.clone()),
        );
        let filtering = context.metrics.stage(Stage::Filter);
        let shuffling = context.metrics.stage(Stage::Shuffle);
        let waiting = [filtering.clone(), shuffling.clone()];
        Self {
            lane: lane.lane,
            order: config.order,
            resample: config.resample,
            open_shards: lane.open_shards,
            epoch_share: lane.epoch_share,
            resume: lane.resume,
            opener: ShardOpener::new(
                config.shards.clone(),
                config.listed.clone(),
                context,
                cancel,
                waiting,
            ),
            selector: SampleSelector::new(kind, config),
            events,
            schedule: ShardSchedule::new(lane.plan, state.next, state.complement),
            prefetched: VecDeque::new(),
            slots: Vec::new(),
            buffer: ShuffleBuffer::new(config.seed, lane.lane, lane.buffer),
            pushed: Vec::new(),
            filtering,
            shuffling,
            position,
            epoch: state.epoch,
            accepted: state.accepted,
            turn: state.turn,
            passes: state.passes,
            read: state.read,
            selected_any: position > 0,
            empty_shard: None,
        }
    }

    pub(super) fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.run_epochs()));
        let result = result.unwrap_or_else(|payload| {
            Err(Halt::Failed(StreamError::Panicked {
                stage: Stage::Shuffle,
                message: panic_message(payload.as_ref()),
            }))
        });
        if let Err(Halt::Failed(error)) = result {
            // Fails only while the stream is being dropped.
            self.pass_on(StreamEvent::Failed(error)).ok();
        }
    }

    fn run_epochs(&mut self) -> Result<(), Halt> {
        match self.resume.take() {
            Some(cursor) => self.resume_at(&cursor)?,
            None => self.begin_epoch()?,
        }
        loop {
            self.finish_epoch()?;
            if self.accepted == 0 {
                self.read_the_rest()?;
            }
            if self.order == Order::Sequential {
                return Ok(());
            }
            (self.epoch, self.accepted, self.turn) = (self.epoch + 1, 0, 0);
            self.begin_epoch()?;
        }
    }

    /// Reads the open shards and the contents of the shuffle buffer again.
    fn resume_at(&mut self, cursor: &LaneCursor) -> Result<(), Halt> {
        let Reread { slots, buffer } =
            reread(cursor, &self.opener, &mut self.selector, self.open_shards)?;
        self.slots = slots;
        let items = buffer.into_iter().map(|sample| {
            let bytes = sample.bytes() as u64;
            (sample, bytes)
        });
        self.buffer.resume(cursor.state.shuffle, items.collect());
        Ok(())
    }

    fn begin_epoch(&mut self) -> Result<(), Halt> {
        let width = match self.order {
            Order::Shuffled => self.open_shards,
            Order::Sequential => 1,
        };
        while self.slots.len() < width
            && let Some(slot) = self.begin_shard()?
        {
            self.slots.push(slot);
        }
        Ok(())
    }

    /// Reads the rest of the epoch.
    fn finish_epoch(&mut self) -> Result<(), Halt> {
        let share = self.epoch_share;
        // A cursor can lie between two draws.
        self.draw_to_capacity()?;
        while !self.slots.is_empty() && share.is_none_or(|share| self.accepted < share) {
            let turn = self.turn % self.slots.len();
            match self.opener.next_event(&self.slots[turn].shard)? {
                ShardEvent::Sample(sample) => self.add_sample(turn, &sample)?,
                ShardEvent::NonSample(_) => {}
                ShardEvent::End { broken } => {
                    let OpenPass { pass, taken, .. } = self.slots[turn].at;
                    if taken == 0 && broken.is_none() {
                        self.empty_shard.get_or_insert(pass.shard);
                    }
                    // The next shard takes the slot and the turn.
                    self.turn = turn;
                    let ended = match self.begin_shard()? {
                        Some(next) => std::mem::replace(&mut self.slots[turn], next),
                        None => self.slots.remove(turn),
                    };
                    self.end_shard(&ended, broken)?;
                }
                ShardEvent::Failed(error) => return Err(Halt::Failed(error)),
            }
        }
        // The rest of the epoch exceeds max_samples and is not read.
        self.schedule.skip_rest_of(self.epoch);
        self.prefetched
            .retain(|shard| shard.position.epoch != self.epoch);
        for slot in std::mem::take(&mut self.slots) {
            self.end_shard(&slot, None)?;
        }
        // With replacement, samples of two epochs may mix in the buffer.
        let continuous = self.order == Order::Shuffled && self.resample;
        while !continuous && !self.buffer.is_empty() {
            self.draw()?;
        }
        self.pass_on(StreamEvent::EpochDone { read: self.read })
    }

    /// After an epoch without a selected sample: makes the next epoch read the shards that this one did not read. Draws with
    /// replacement leave out a third of the shards, and each lane reads only some. Fails if every shard was read.
    fn read_the_rest(&mut self) -> Result<(), Halt> {
        let read_all =
            self.order == Order::Sequential || self.schedule.complement() == Some(self.epoch);
        self.prefetched.clear();
        if read_all {
            return Err(self.nothing_usable());
        }
        let rest = self.schedule.complete(self.epoch);
        if rest == 0 {
            return Err(self.nothing_usable());
        }
        if !self.selected_any {
            let all = self.opener.count();
            tracing::warn!(
                "no sample can be used so far, from {} of {all} shards: reading the others",
                all - rest
            );
        }
        Ok(())
    }

    fn nothing_usable(&self) -> Halt {
        let empty_shard = self.empty_shard.map(|shard| self.opener.url(shard));
        Halt::Failed(StreamError::NothingUsable {
            report: FilterReport {
                empty_shard,
                ..self.selector.report()
            },
            examples: SkipExamples::default(),
        })
    }

    /// The next shard of the epoch, opened. Opens the shards that follow as well.
    fn begin_shard(&mut self) -> Result<Option<OpenSlot>, Halt> {
        let lookahead = match self.order {
            Order::Shuffled => 1,
            Order::Sequential => self.open_shards,
        };
        while self.prefetched.len() < lookahead + 1 {
            let Some((position, index)) = self.schedule.next() else {
                break;
            };
            let shard = self.opener.open(index)?;
            self.prefetched.push_back(PrefetchedShard {
                position,
                index,
                shard,
            });
        }
        let Some(next) = self
            .prefetched
            .pop_front_if(|next| next.position.epoch == self.epoch)
        else {
            return Ok(None);
        };
        let pass = ShardPass {
            id: self.passes,
            shard: next.index,
            epoch: self.epoch,
        };
        self.passes += 1;
        Ok(Some(OpenSlot {
            at: OpenPass {
                pass,
                taken: 0,
                selected: 0,
            },
            shard: next.shard,
        }))
    }

    /// Filters and shuffles one sample of the shard in slot `turn`.
    fn add_sample(&mut self, turn: usize, sample: &Sample) -> Result<(), Halt> {
        let at = &mut self.slots[turn].at;
        let (pass, index) = (at.pass, at.taken);
        at.taken += 1;
        self.turn = turn + 1;
        let selector = &mut self.selector;
        let selected = self.filtering.work(|| selector.select(pass, index, sample));
        self.filtering.add_items(1);
        match selected {
            Ok(selected) => {
                self.read += 1;
                self.accepted += 1;
                self.selected_any = true;
                self.slots[turn].at.selected += 1;
                self.pushed.push(SampleRef {
                    pass: pass.id,
                    index,
                });
                let bytes = selected.bytes() as u64;
                if self.shuffling.work(|| self.buffer.push(selected, bytes)) {
                    self.draw()?;
                }
                self.draw_to_capacity()
            }
            Err(unselected) => self.skip_sample(pass, sample, unselected),
        }
    }

    fn skip_sample(
        &mut self,
        pass: ShardPass,
        sample: &Sample,
        unselected: Unselected,
    ) -> Result<(), Halt> {
        let Unselected { key, reason } = unselected;
        self.read += u64::from(reason.is_broken());
        let name = reason.name();
        let example = self.selector.count_skipped(pass, sample, &reason);
        self.opener.metrics().skip(&name);
        let url = self.opener.url(pass.shard);
        tracing::debug!(shard = %url, %key, reason = %name, "sample skipped");
        self.pass_on(StreamEvent::Skipped {
            pass,
            key,
            reason,
            example,
            read: self.read,
        })?;
        if !self.selected_any && self.selector.begins_to_miss_a_key() {
            tracing::warn!("no sample can be used so far: {}", self.selector.report());
        }
        Ok(())
    }

    /// Draws until the buffer is within its limit of bytes.
    fn draw_to_capacity(&mut self) -> Result<(), Halt> {
        while self.buffer.is_overfull() {
            self.draw()?;
        }
        Ok(())
    }

    /// Draws a sample from the buffer and sends it to the decode threads.
    fn draw(&mut self) -> Result<(), Halt> {
        let Some(Drawn { item, slot }) = self.shuffling.work(|| self.buffer.draw()) else {
            return Ok(());
        };
        self.shuffling.add_items(1);
        let draw = ShuffleDraw {
            pushed: std::mem::take(&mut self.pushed),
            slot,
            state: self.state(),
        };
        let job = DecodeJob {
            sample: item,
            lane: self.lane,
            position: self.position,
            draw: Box::new(draw),
        };
        self.position += 1;
        let start = Instant::now();
        let sent = self.events.send(job, &self.shuffling);
        self.filtering.add_blocked(start.elapsed());
        Ok(sent?)
    }

    fn state(&self) -> OrderState {
        OrderState {
            epoch: self.epoch,
            accepted: self.accepted,
            open: self.slots.iter().map(|slot| slot.at).collect(),
            turn: self.turn,
            next: self
                .prefetched
                .front()
                .map_or_else(|| self.schedule.position(), |next| next.position),
            passes: self.passes,
            read: self.read,
            shuffle: self.buffer.state(),
            complement: self
                .schedule
                .complement()
                .filter(|&epoch| epoch >= self.epoch),
        }
    }

    fn end_shard(&mut self, slot: &OpenSlot, broken: Option<String>) -> Result<(), Halt> {
        let OpenPass { pass, selected, .. } = slot.at;
        self.selector.end_shard(pass);
        if let Some(cause) = &broken {
            let url = self.opener.url(pass.shard);
            tracing::warn!(shard = %url, cause, "broken shard: the samples before the fault are used");
            self.opener.metrics().skip("broken_shard");
        }
        self.pass_on(StreamEvent::ShardDone {
            pass,
            selected,
            broken,
        })
    }

    /// Sends an event that needs no decoding.
    fn pass_on(&self, event: StreamEvent<K>) -> Result<(), Halt> {
        let start = Instant::now();
        let sent = self.events.pass(event, &self.shuffling);
        self.filtering.add_blocked(start.elapsed());
        Ok(sent?)
    }
}
