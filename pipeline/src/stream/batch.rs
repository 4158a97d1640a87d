//! The last thread: collects batches, keeps count of every shard, and ends a stream that is too
//! broken to go on.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::flow::{Closed, OrderedReceiver, Sender, StageHandle};
use crate::order::{Cursor, Order, OrderIdentity, Place, SampleRef, Tally, Visit};
use crate::panic::panic_message;
use crate::shard::FilterReport;
use crate::stages::Stage;

use super::config::StreamConfig;
use super::content::BatchContent;
use super::error::StreamError;
use super::prepare::SampleMeta;
use super::step::{Draw, Reason, Step};

/// The part of broken samples is judged from this many on, and at the end of every epoch.
const JUDGED_AFTER: u64 = 100;

/// Samples ready for the models.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Its number in the stream, from 0.
    pub index: u64,
    /// What is known of each sample.
    pub samples: Vec<SampleMeta>,
    /// What the models read of them.
    pub content: BatchContent,
    /// The place right after this batch.
    pub cursor: Cursor,
    /// Samples left out since the batch before, in the order of the stream.
    pub skipped: Vec<SkippedSample>,
    /// Shards of which nothing more will come. In a [`Order::Sequential`] stream this is exact: a
    /// shard stands with the batch that holds its last sample.
    pub finished_shards: Vec<ShardSummary>,
}

/// A sample that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedSample {
    /// Index of its shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Its key in the shard.
    pub key: Arc<str>,
    /// Why, as the metrics have it: `decode_error`, `filter:min_size` …
    pub reason: String,
}

/// What became of a shard's samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSummary {
    /// Index of the shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Samples that came out of it.
    pub samples: u64,
    /// Samples left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// What was wrong with the tar, if it was cut off or damaged.
    pub broken: Option<String>,
}

impl ShardSummary {
    /// Of a shard that is through.
    fn new(tally: Tally) -> Self {
        let mut skipped = tally.left_out;
        let undecodable: u64 = tally.undecodable.values().sum();
        for (reason, count) in tally.undecodable {
            *skipped.entry(reason).or_default() += count;
        }
        Self {
            shard: tally.shard,
            samples: tally.through.saturating_sub(undecodable),
            skipped,
            broken: tally.done.and_then(|(_, broken)| broken),
        }
    }
}

enum Stop {
    Closed,
    Failed(StreamError),
}

impl From<Closed> for Stop {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

pub(super) struct Batcher {
    out: Sender<Result<Batch, StreamError>>,
    stage: StageHandle,
    identity: OrderIdentity,
    batch_size: usize,
    max_bad_fraction: f64,
    sequential: bool,
    resumed: bool,
    /// Whether any sample has come, and any batch gone.
    begun: bool,
    delivered: bool,
    next_batch: u64,
    samples: Vec<SampleMeta>,
    content: Option<BatchContent>,
    /// Sequential order: the last batch, held until it is known which shards end with it.
    held: Option<Batch>,
    tallies: BTreeMap<u64, Tally>,
    skipped: Vec<SkippedSample>,
    finished: Vec<ShardSummary>,
    /// Broken samples by reason, in all.
    broken: BTreeMap<String, u64>,
    /// What was in the shuffle buffer after the last sample that came, in its order.
    buffer: Vec<SampleRef>,
    place: Place,
}

impl Batcher {
    pub(super) fn new(
        config: &StreamConfig,
        identity: OrderIdentity,
        out: Sender<Result<Batch, StreamError>>,
        stage: StageHandle,
    ) -> Self {
        let resume = config.resume.as_ref();
        let from = |cursor: &Cursor| {
            let Cursor {
                next_batch,
                broken,
                place,
                buffer,
                visits,
                ..
            } = cursor.clone();
            (next_batch, broken, place, buffer, visits)
        };
        let (next_batch, broken, place, buffer, tallies) = resume.map(from).unwrap_or_default();
        Self {
            out,
            stage,
            identity,
            batch_size: config.batch_size,
            max_bad_fraction: config.max_bad_fraction,
            sequential: config.order == Order::Sequential,
            resumed: resume.is_some(),
            begun: false,
            delivered: false,
            next_batch,
            samples: Vec::new(),
            content: None,
            held: None,
            tallies,
            skipped: Vec::new(),
            finished: Vec::new(),
            broken,
            buffer,
            place,
        }
    }

    pub(super) fn run(mut self, steps: &OrderedReceiver<Step>) {
        let result =
            catch_unwind(AssertUnwindSafe(|| self.collect(steps))).unwrap_or_else(|payload| {
                Err(Stop::Failed(StreamError::Panicked {
                    stage: Stage::Batch,
                    message: panic_message(payload.as_ref()),
                }))
            });
        if let Err(Stop::Failed(mut error)) = result {
            // What was finished before the fault is still good.
            if self.release_held().is_ok() {
                if let StreamError::NothingUsable {
                    shards, skipped, ..
                } = &mut error
                {
                    *shards = std::mem::take(&mut self.finished);
                    *skipped = std::mem::take(&mut self.skipped);
                }
                let _closed = self.out.send_blocking(Err(error), &self.stage);
            }
        }
    }

    fn collect(&mut self, steps: &OrderedReceiver<Step>) -> Result<(), Stop> {
        while let Some(step) = steps.recv(&self.stage) {
            match step {
                Ok(step) => self.step(step)?,
                Err(message) => {
                    return Err(Stop::Failed(StreamError::Panicked {
                        stage: Stage::Decode,
                        message,
                    }));
                }
            }
        }
        // The order is at its end: only a sequential stream gets here, or one that is being dropped.
        if self.sequential {
            if let Some(last) = self.samples.last() {
                let (position, epoch) = (last.position + 1, last.epoch);
                self.complete(position, epoch)?;
            }
            self.release_held()?;
            if !self.delivered && !self.resumed {
                return Err(Stop::Failed(StreamError::NothingUsable {
                    report: FilterReport {
                        seen: self.broken.values().sum(),
                        rejected: self.broken.clone(),
                        missing_keys: Vec::new(),
                    },
                    shards: Vec::new(),
                    skipped: Vec::new(),
                }));
            }
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), Stop> {
        match step {
            Step::Ready {
                visit,
                meta,
                content,
                draw,
            } => {
                self.came_through(visit, *draw);
                self.add(*meta, content, visit)
            }
            Step::Undecodable {
                visit,
                key,
                reason,
                draw,
            } => {
                let read = draw.place.read;
                let reason = reason.name().into_owned();
                self.stage.metrics().skip(&reason);
                *self.broken.entry(reason.clone()).or_default() += 1;
                let tally = self.came_through(visit, *draw);
                *tally.undecodable.entry(reason.clone()).or_default() += 1;
                self.skip(visit, key, reason);
                self.settle(visit);
                self.judge(read, JUDGED_AFTER)
            }
            Step::LeftOut {
                visit,
                key,
                reason,
                read,
            } => self.left_out(visit, key, &reason, read),
            Step::ShardDone {
                visit,
                chosen,
                broken,
            } => {
                self.tally(visit).done = Some((chosen, broken));
                self.settle(visit);
                Ok(())
            }
            Step::EpochDone { read } => self.judge(read, 1),
            Step::Failed(error) => Err(Stop::Failed(error)),
        }
    }

    fn left_out(
        &mut self,
        visit: Visit,
        key: Arc<str>,
        reason: &Reason,
        read: u64,
    ) -> Result<(), Stop> {
        let name = reason.name().into_owned();
        *self.tally(visit).left_out.entry(name.clone()).or_default() += 1;
        self.skip(visit, key, name.clone());
        if reason.is_broken() {
            *self.broken.entry(name).or_default() += 1;
            self.judge(read, JUDGED_AFTER)?;
        }
        Ok(())
    }

    fn skip(&mut self, visit: Visit, key: Arc<str>, reason: String) {
        self.skipped.push(SkippedSample {
            shard: visit.shard,
            key,
            reason,
        });
    }

    fn tally(&mut self, visit: Visit) -> &mut Tally {
        self.tallies.entry(visit.id).or_insert_with(|| Tally {
            shard: visit.shard,
            epoch: visit.epoch,
            ..Tally::default()
        })
    }

    /// Notes that a sample came out of the shuffle buffer.
    fn came_through(&mut self, visit: Visit, draw: Draw) -> &mut Tally {
        self.buffer.extend(draw.pushed);
        self.buffer.swap_remove(draw.slot);
        self.place = draw.place;
        let tally = self.tally(visit);
        tally.through += 1;
        tally
    }

    /// Moves a shard to the finished ones once all of its samples have come through.
    fn settle(&mut self, visit: Visit) {
        let complete = self.tallies.get(&visit.id).is_some_and(
            |tally| matches!(tally.done, Some((chosen, _)) if tally.through == chosen),
        );
        if complete && let Some(tally) = self.tallies.remove(&visit.id) {
            self.finished.push(ShardSummary::new(tally));
        }
    }

    /// Ends the stream if too many of the samples read are broken.
    fn judge(&self, read: u64, from: u64) -> Result<(), Stop> {
        let broken: u64 = self.broken.values().sum();
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of samples stay far below 2^53"
        )]
        let too_many = broken as f64 > self.max_bad_fraction * read as f64;
        if read < from || !too_many {
            return Ok(());
        }
        Err(Stop::Failed(StreamError::TooManyBroken {
            broken,
            read,
            allowed: self.max_bad_fraction,
            counts: self.broken.clone(),
        }))
    }

    fn add(&mut self, meta: SampleMeta, content: BatchContent, visit: Visit) -> Result<(), Stop> {
        if self.held.is_some() {
            self.release_held()?;
        } else if self.sequential && self.resumed && !self.begun {
            // Reported with the batch before.
            self.finished.clear();
            self.skipped.clear();
        }
        self.begun = true;
        let stage = self.stage.clone();
        stage.add_bytes(content.bytes() as u64);
        stage.work(|| match &mut self.content {
            Some(batch) => batch.push(&content),
            none => none.insert(content).reserve(self.batch_size),
        });
        let (position, epoch) = (meta.position + 1, meta.epoch);
        self.samples.push(meta);
        self.settle(visit);
        if self.samples.len() == self.batch_size {
            self.complete(position, epoch)?;
        }
        Ok(())
    }

    /// Makes a batch of what is collected. `position` and `epoch` are those after its last sample.
    fn complete(&mut self, position: u64, epoch: u64) -> Result<(), Closed> {
        let Some(content) = self.content.take() else {
            return Ok(());
        };
        let index = self.next_batch;
        self.next_batch += 1;
        let mut cursor = Cursor::new(self.identity.clone(), position, epoch, self.next_batch);
        cursor.broken = self.broken.clone();
        cursor.place = self.place.clone();
        cursor.buffer = self.buffer.clone();
        cursor.visits = self.tallies.clone();
        self.held = Some(Batch {
            index,
            samples: std::mem::take(&mut self.samples),
            content,
            cursor,
            skipped: Vec::new(),
            finished_shards: Vec::new(),
        });
        if self.sequential {
            return Ok(());
        }
        self.release_held()
    }

    /// Sends the batch that is held, with what was left out and the shards that ended by now.
    fn release_held(&mut self) -> Result<(), Closed> {
        let Some(mut batch) = self.held.take() else {
            return Ok(());
        };
        batch.skipped = std::mem::take(&mut self.skipped);
        batch.finished_shards = std::mem::take(&mut self.finished);
        self.stage.add_items(1);
        self.delivered = true;
        self.out.send_blocking(Ok(batch), &self.stage)
    }
}
