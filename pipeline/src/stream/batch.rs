//! The last thread: collects batches, keeps count of every shard, and ends a stream that is too
//! broken to go on.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::flow::{Closed, OrderedReceiver, Sender, Stage, StageHandle, panic_message};
use crate::image::normalize;
use crate::order::{Cursor, Order, OrderIdentity};
use crate::shard::FilterReport;

use super::config::StreamConfig;
use super::error::StreamError;
use super::prepare::SampleMeta;
use super::step::{Reason, Step, Visit};

/// The part of broken samples is judged from this many on, and at the end of every epoch.
const JUDGED_AFTER: u64 = 100;

/// Samples ready for the models.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelBatch {
    /// Its number in the stream, from 0.
    pub index: u64,
    /// What is known of each sample.
    pub samples: Vec<SampleMeta>,
    /// The images, `[B, 3, R, R]` in this order, -1.0 to 1.0.
    pub pixels: Vec<f32>,
    /// `R`: side of the images.
    pub resolution: u32,
    /// The place right after this batch.
    pub cursor: Cursor,
    /// Shards of which nothing more will come. In a [`Order::Sequential`] stream this is exact: a
    /// shard stands with the batch that holds its last sample.
    pub finished_shards: Vec<ShardSummary>,
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

/// A shard of which samples may still come.
#[derive(Default)]
struct Tally {
    /// Samples left out before the shuffle, by reason.
    left_out: BTreeMap<String, u64>,
    /// Of the samples chosen from it, those that have come through, and those of them that were
    /// found broken then.
    through: u64,
    undecodable: BTreeMap<String, u64>,
    done: Option<(u64, Option<String>)>,
}

impl Tally {
    fn skipped(&self) -> BTreeMap<String, u64> {
        let mut skipped = self.left_out.clone();
        for (reason, count) in &self.undecodable {
            *skipped.entry(reason.clone()).or_default() += count;
        }
        skipped
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
    out: Sender<Result<PixelBatch, StreamError>>,
    stage: StageHandle,
    identity: OrderIdentity,
    batch_size: usize,
    resolution: u32,
    max_bad_fraction: f64,
    sequential: bool,
    resume_at: u64,
    /// Whether what comes through lies before the place the stream goes on from.
    replaying: bool,
    /// Whether any sample has come, and any batch gone.
    begun: bool,
    delivered: bool,
    next_batch: u64,
    samples: Vec<SampleMeta>,
    pixels: Vec<f32>,
    /// Sequential order: the last batch, held until it is known which shards end with it.
    held: Option<PixelBatch>,
    tallies: HashMap<u64, Tally>,
    finished: Vec<ShardSummary>,
    /// Broken samples by reason, in all.
    broken: BTreeMap<String, u64>,
    /// Those of them found when decoding: they belong to the cursor.
    undecodable: BTreeMap<String, u64>,
}

impl Batcher {
    pub(super) fn new(
        config: &StreamConfig,
        identity: OrderIdentity,
        out: Sender<Result<PixelBatch, StreamError>>,
        stage: StageHandle,
    ) -> Self {
        let (mut undecodable, mut tallies) = (BTreeMap::new(), HashMap::new());
        if let Some(cursor) = &config.resume {
            undecodable.clone_from(&cursor.skipped);
            for (&visit, undecodable) in &cursor.open_visits {
                let tally = Tally {
                    undecodable: undecodable.clone(),
                    ..Tally::default()
                };
                tallies.insert(visit, tally);
            }
        }
        Self {
            out,
            stage,
            identity,
            batch_size: config.batch_size,
            resolution: config.image.resolution,
            max_bad_fraction: config.max_bad_fraction,
            sequential: config.order == Order::Sequential,
            resume_at: config.resume.as_ref().map_or(0, |cursor| cursor.position),
            next_batch: config.resume.as_ref().map_or(0, |cursor| cursor.next_batch),
            replaying: config
                .resume
                .as_ref()
                .is_some_and(|cursor| cursor.position > 0),
            begun: false,
            delivered: false,
            samples: Vec::new(),
            pixels: Vec::new(),
            held: None,
            tallies,
            finished: Vec::new(),
            broken: undecodable.clone(),
            undecodable,
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
        if let Err(Stop::Failed(error)) = result {
            // What was finished before the fault is still good.
            if self.release_held().is_ok() {
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
            if !self.delivered && self.resume_at == 0 {
                return Err(Stop::Failed(StreamError::NothingUsable {
                    report: FilterReport {
                        seen: self.broken.values().sum(),
                        rejected: self.broken.clone(),
                        missing_keys: Vec::new(),
                    },
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
                pixels,
            } => {
                self.came_through(visit);
                self.add(*meta, &pixels, visit)?;
            }
            Step::Undecodable {
                visit,
                reason,
                read,
            } => {
                let name = reason.name().into_owned();
                self.stage.metrics().skip(&name);
                *self.undecodable.entry(name.clone()).or_default() += 1;
                *self.broken.entry(name.clone()).or_default() += 1;
                *self
                    .came_through(visit)
                    .undecodable
                    .entry(name)
                    .or_default() += 1;
                self.settle(visit);
                self.judge(read, JUDGED_AFTER)?;
            }
            Step::Passed { visit, position } => {
                self.came_through(visit);
                self.settle(visit);
                self.replaying = position + 1 < self.resume_at;
                if !self.replaying && !self.sequential {
                    // These were reported with the batches before.
                    self.finished.clear();
                }
            }
            Step::LeftOut {
                visit,
                reason,
                read,
            } => self.left_out(visit, &reason, read)?,
            Step::ShardDone {
                visit,
                chosen,
                broken,
            } => {
                self.tallies.entry(visit.id).or_default().done = Some((chosen, broken));
                self.settle(visit);
            }
            Step::EpochDone { read } => self.judge(read, 1)?,
            Step::Failed(error) => return Err(Stop::Failed(error)),
        }
        Ok(())
    }

    fn left_out(&mut self, visit: Visit, reason: &Reason, read: u64) -> Result<(), Stop> {
        let name = reason.name().into_owned();
        let tally = self.tallies.entry(visit.id).or_default();
        *tally.left_out.entry(name.clone()).or_default() += 1;
        if reason.is_broken() {
            *self.broken.entry(name).or_default() += 1;
            self.judge(read, JUDGED_AFTER)?;
        }
        Ok(())
    }

    fn came_through(&mut self, visit: Visit) -> &mut Tally {
        let tally = self.tallies.entry(visit.id).or_default();
        tally.through += 1;
        tally
    }

    /// Moves a shard to the finished ones once all of its samples have come through.
    fn settle(&mut self, visit: Visit) {
        let complete = self.tallies.get(&visit.id).is_some_and(
            |tally| matches!(tally.done, Some((chosen, _)) if tally.through == chosen),
        );
        if !complete {
            return;
        }
        if let Some(tally) = self.tallies.remove(&visit.id) {
            self.finished.push(ShardSummary {
                shard: visit.shard,
                samples: tally
                    .through
                    .saturating_sub(tally.undecodable.values().sum()),
                skipped: tally.skipped(),
                broken: tally.done.and_then(|(_, broken)| broken),
            });
        }
    }

    /// Ends the stream if too many of the samples read are broken.
    fn judge(&self, read: u64, from: u64) -> Result<(), Stop> {
        // Of a replay the broken samples are known, but only part of those read.
        if self.replaying {
            return Ok(());
        }
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

    fn add(&mut self, meta: SampleMeta, pixels: &[u8], visit: Visit) -> Result<(), Stop> {
        if self.held.is_some() {
            self.release_held()?;
        } else if self.sequential && self.resume_at > 0 && !self.begun {
            // Reported with the batch before.
            self.finished.clear();
        }
        self.begun = true;
        let side = self.resolution as usize;
        let stage = self.stage.clone();
        stage.work(|| {
            if self.pixels.capacity() == 0 {
                self.pixels.reserve_exact(self.batch_size * 3 * side * side);
            }
            self.pixels
                .extend(pixels.iter().map(|&level| normalize(level)));
        });
        stage.add_bytes(4 * pixels.len() as u64);
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
        let index = self.next_batch;
        self.next_batch += 1;
        let mut cursor = Cursor::new(self.identity.clone(), position, epoch, self.next_batch);
        cursor.skipped = self.undecodable.clone();
        for (&visit, tally) in &self.tallies {
            if !tally.undecodable.is_empty() {
                cursor.open_visits.insert(visit, tally.undecodable.clone());
            }
        }
        self.held = Some(PixelBatch {
            index,
            samples: std::mem::take(&mut self.samples),
            pixels: std::mem::take(&mut self.pixels),
            resolution: self.resolution,
            cursor,
            finished_shards: Vec::new(),
        });
        if self.sequential {
            return Ok(());
        }
        self.release_held()
    }

    /// Sends the batch that is held, with the shards that ended by now.
    fn release_held(&mut self) -> Result<(), Closed> {
        let Some(mut batch) = self.held.take() else {
            return Ok(());
        };
        batch.finished_shards = std::mem::take(&mut self.finished);
        self.stage.add_items(1);
        self.delivered = true;
        self.out.send_blocking(Ok(batch), &self.stage)
    }
}
