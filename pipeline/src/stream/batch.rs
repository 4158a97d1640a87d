//! The batcher: a thread that collects batches, counts per shard, and ends a stream with too many broken samples.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use crate::flow::{Closed, OrderedReceiver, Sender, StageHandle};
use crate::order::{
    BufferMirror, Cursor, LaneCursor, Order, OrderIdentity, OrderState, SampleRef, ShardPass,
    ShardProgress,
};
use crate::panic::panic_message;
use crate::shard::ShardUrl;
use crate::stages::Stage;

use super::config::{LaneConfig, StreamConfig};
use super::data::BatchData;
use super::error::{Halt, StreamError};
use super::event::{ShuffleDraw, StreamEvent};
use super::kinds::SampleKind;
use super::left_out::LeftOut;
use super::sample::SampleMeta;
use super::skip::{ShardSummary, SkipExamples, SkipReason, SkippedSample, Undelivered};

/// The fraction of broken samples is checked after this many samples. It is also checked at the end of every epoch that
/// reads each shard once; the few shards of a short epoch of draws may be the only broken ones.
const CHECKED_AFTER: u64 = 100;

/// Samples ready for the models. `D` is the data of the samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch<D = BatchData> {
    /// Number in the stream, from 0.
    pub index: u64,
    /// Metadata of each sample.
    pub samples: Vec<SampleMeta>,
    /// Data of the samples.
    pub data: D,
    /// The position right after this batch.
    pub cursor: Cursor,
    /// Samples skipped since the batch before, in the order of the stream.
    pub skipped: Vec<SkippedSample>,
    /// Shards whose samples have all been delivered. Exact in an [`Order::Sequential`] stream: a
    /// shard is listed in the batch that holds its last sample.
    pub finished_shards: Vec<ShardSummary>,
}

/// Where the batches of a lane go.
pub(super) struct BatchOutput<D> {
    pub(super) batches: Sender<Result<Batch<D>, StreamError>>,
    /// Receives the rest when the stream ends in an error.
    pub(super) undelivered: Arc<Mutex<Undelivered>>,
}

pub(super) struct Batcher<K: SampleKind> {
    kind: K,
    lane: usize,
    out: BatchOutput<K::Output>,
    stage: StageHandle,
    identity: OrderIdentity,
    batch_size: usize,
    max_bad_fraction: f64,
    sequential: bool,
    /// Whether shards are drawn with replacement.
    draws: bool,
    skip_duplicate_keys: bool,
    resumed: bool,
    /// Whether any sample has been added, and any batch delivered.
    begun: bool,
    delivered: bool,
    next_batch: u64,
    samples: Vec<SampleMeta>,
    data: K::Collected,
    /// Sequential order: the last batch, held until it is known which shards end with it.
    held: Option<Batch<K::Output>>,
    shards: BTreeMap<u64, ShardProgress>,
    skipped: Vec<SkippedSample>,
    finished: Vec<ShardSummary>,
    /// All broken samples, by reason.
    broken: BTreeMap<String, u64>,
    left_out: LeftOut,
    /// The last decoded sample: its shard pass and its key.
    last: Option<(u64, Arc<str>)>,
    /// Contents of the shuffle buffer after the last drawn sample.
    buffer: BufferMirror<SampleRef>,
    /// State of the interleaver after the last drawn sample.
    state: OrderState,
}

impl<K: SampleKind> Batcher<K> {
    pub(super) fn new(
        kind: K,
        config: &StreamConfig,
        lane: &LaneConfig,
        identity: OrderIdentity,
        shards: Arc<[ShardUrl]>,
        out: BatchOutput<K::Output>,
        stage: StageHandle,
    ) -> Self {
        let resumed = lane.resume.is_some();
        let start = lane.resume.clone().unwrap_or_default();
        Self {
            kind,
            lane: lane.lane,
            out,
            stage,
            identity,
            batch_size: config.batch_size,
            max_bad_fraction: config.max_bad_fraction,
            sequential: config.order == Order::Sequential,
            draws: config.order == Order::Shuffled && config.resample,
            skip_duplicate_keys: config.skip_duplicate_keys,
            resumed,
            begun: false,
            delivered: false,
            next_batch: start.next_batch,
            samples: Vec::new(),
            data: K::Collected::default(),
            held: None,
            shards: start.shards,
            skipped: Vec::new(),
            finished: Vec::new(),
            broken: start.broken,
            left_out: LeftOut::new(config, shards),
            last: None,
            buffer: BufferMirror::new(start.buffer),
            state: start.state,
        }
    }

    pub(super) fn run(mut self, events: &OrderedReceiver<StreamEvent<K>>) {
        let result = catch_unwind(AssertUnwindSafe(|| self.collect(events)));
        let result = result.unwrap_or_else(|payload| {
            Err(Halt::Failed(StreamError::Panicked {
                stage: Stage::Batch,
                message: panic_message(payload.as_ref()),
            }))
        });
        if let Err(Halt::Failed(error)) = result {
            // Fails only if the consumer is gone.
            self.fail(error).ok();
        }
    }

    /// Delivers the batch that was complete before the fault, then the error.
    fn fail(&mut self, mut error: StreamError) -> Result<(), Closed> {
        self.release_held()?;
        self.left_out.illustrate(&mut error);
        let undelivered = Undelivered {
            skipped: std::mem::take(&mut self.skipped),
            finished_shards: std::mem::take(&mut self.finished),
        };
        *self
            .out
            .undelivered
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = undelivered;
        self.out.batches.send_blocking(Err(error), &self.stage)
    }

    fn collect(&mut self, events: &OrderedReceiver<StreamEvent<K>>) -> Result<(), Halt> {
        while let Some(event) = events.recv(&self.stage) {
            match event {
                Ok(event) => self.handle(event)?,
                Err(message) => {
                    return Err(Halt::Failed(StreamError::Panicked {
                        stage: Stage::Decode,
                        message,
                    }));
                }
            }
        }
        // Only a sequential stream has an end. Other streams end here only while they are dropped.
        if self.sequential {
            if let Some(last) = self.samples.last() {
                let (position, epoch) = (last.position + 1, last.epoch);
                self.complete(position, epoch)?;
            }
            self.release_held()?;
            if !self.delivered && !self.resumed {
                return Err(Halt::Failed(self.left_out.nothing_usable()));
            }
        }
        Ok(())
    }

    fn handle(&mut self, event: StreamEvent<K>) -> Result<(), Halt> {
        match event {
            StreamEvent::Decoded {
                pass,
                meta,
                data,
                draw,
            } => {
                if self.repeats_last_key(pass, &meta.key) {
                    let cause = "has the key of the sample before it".to_owned();
                    return self.skip_drawn(
                        pass,
                        meta.key,
                        &SkipReason::DUPLICATE_KEY,
                        cause,
                        *draw,
                    );
                }
                self.left_out.decoded();
                self.record_draw(pass, *draw);
                self.add(*meta, &data, pass)
            }
            StreamEvent::Undecodable {
                pass,
                key,
                reason,
                cause,
                draw,
            } => self.skip_drawn(pass, key, &reason, cause, *draw),
            StreamEvent::Skipped {
                pass,
                key,
                reason,
                example,
                read,
            } => self.skip_unselected(pass, key, &reason, example, read),
            StreamEvent::ShardDone {
                pass,
                selected,
                broken,
            } => {
                if let Some(cause) = &broken {
                    self.left_out.broken_shard(pass.shard, cause);
                }
                self.progress(pass).done = Some((selected, broken));
                self.finish_if_complete(pass);
                Ok(self.left_out.check_usable()?)
            }
            StreamEvent::EpochDone { read } => {
                self.check_bad_fraction(read, if self.draws { CHECKED_AFTER } else { 1 })
            }
            StreamEvent::Failed(error) => Err(Halt::Failed(error)),
        }
    }

    /// Records a sample that was skipped before the shuffle.
    fn skip_unselected(
        &mut self,
        pass: ShardPass,
        key: Arc<str>,
        reason: &SkipReason,
        example: Option<String>,
        read: u64,
    ) -> Result<(), Halt> {
        let name = reason.name().into_owned();
        let left_out = &mut self.progress(pass).left_out;
        *left_out.entry(name.clone()).or_default() += 1;
        self.left_out.count(pass.shard, &key, &name, example);
        self.skip(pass, key, name.clone());
        if reason.is_broken() {
            *self.broken.entry(name).or_default() += 1;
            self.check_bad_fraction(read, CHECKED_AFTER)?;
        }
        Ok(())
    }

    /// Records a sample that was drawn and is not delivered.
    fn skip_drawn(
        &mut self,
        pass: ShardPass,
        key: Arc<str>,
        reason: &SkipReason,
        cause: String,
        draw: ShuffleDraw,
    ) -> Result<(), Halt> {
        let read = draw.state.read;
        let name = reason.name().into_owned();
        self.stage.metrics().skip(&name);
        let progress = self.record_draw(pass, draw);
        *progress.undecodable.entry(name.clone()).or_default() += 1;
        self.left_out.count_drawn(pass.shard, &key, &name, cause);
        self.skip(pass, key, name.clone());
        self.finish_if_complete(pass);
        if reason.is_broken() {
            *self.broken.entry(name).or_default() += 1;
            self.check_bad_fraction(read, CHECKED_AFTER)?;
        }
        Ok(self.left_out.check_usable()?)
    }

    /// Whether a decoded sample is to be skipped because the sample before it has its key.
    fn repeats_last_key(&mut self, pass: ShardPass, key: &Arc<str>) -> bool {
        let now = Some((pass.id, Arc::clone(key)));
        let repeats = self.skip_duplicate_keys && self.last == now;
        self.last = now;
        repeats
    }

    fn skip(&mut self, pass: ShardPass, key: Arc<str>, reason: String) {
        self.skipped.push(SkippedSample {
            shard: pass.shard,
            key,
            reason,
        });
    }

    fn progress(&mut self, pass: ShardPass) -> &mut ShardProgress {
        self.shards.entry(pass.id).or_insert_with(|| ShardProgress {
            shard: pass.shard,
            epoch: pass.epoch,
            ..ShardProgress::default()
        })
    }

    /// Records that a sample was drawn from the shuffle buffer.
    fn record_draw(&mut self, pass: ShardPass, draw: ShuffleDraw) -> &mut ShardProgress {
        self.buffer.replay(draw.pushed, draw.slot);
        self.state = draw.state;
        let progress = self.progress(pass);
        progress.drawn += 1;
        progress
    }

    /// Moves a shard to the finished shards once all of its selected samples were drawn.
    fn finish_if_complete(&mut self, pass: ShardPass) {
        let complete = self.shards.get(&pass.id).is_some_and(
            |progress| matches!(progress.done, Some((selected, _)) if progress.drawn == selected),
        );
        if complete && let Some(progress) = self.shards.remove(&pass.id) {
            let summary = ShardSummary::from(progress);
            self.left_out.finished(&summary);
            self.finished.push(summary);
        }
    }

    /// Ends the stream if too many of `read` samples are broken. Fewer than `at_least` samples are not checked.
    fn check_bad_fraction(&self, read: u64, at_least: u64) -> Result<(), Halt> {
        let broken: u64 = self.broken.values().sum();
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of samples stay far below 2^53"
        )]
        let too_many = broken as f64 > self.max_bad_fraction * read as f64;
        if read < at_least || !too_many {
            return Ok(());
        }
        Err(Halt::Failed(StreamError::TooManyBroken {
            broken,
            read,
            allowed: self.max_bad_fraction,
            counts: self.broken.clone(),
            examples: SkipExamples::default(),
        }))
    }

    fn add(&mut self, meta: SampleMeta, data: &K::Decoded, pass: ShardPass) -> Result<(), Halt> {
        if self.held.is_some() {
            self.release_held()?;
        } else if self.sequential && self.resumed && !self.begun {
            // The batch before the cursor listed these.
            self.finished.clear();
            self.skipped.clear();
        }
        self.begun = true;
        self.stage.add_bytes(K::decoded_bytes(data) as u64);
        let (batch, batch_size) = (&mut self.data, self.batch_size);
        self.stage.work(|| K::push(batch, data, batch_size));
        let (position, epoch) = (meta.position + 1, meta.epoch);
        self.samples.push(meta);
        self.finish_if_complete(pass);
        if self.samples.len() == self.batch_size {
            self.complete(position, epoch)?;
        }
        Ok(())
    }

    /// Completes the collected batch. `position` and `epoch` are the cursor's after its last sample.
    fn complete(&mut self, position: u64, epoch: u64) -> Result<(), Closed> {
        let index = self.next_batch;
        self.next_batch += 1;
        let lane = LaneCursor {
            lane: self.lane,
            position,
            epoch,
            next_batch: self.next_batch,
            broken: self.broken.clone(),
            state: self.state.clone(),
            buffer: self.buffer.items().to_vec(),
            shards: self.shards.clone(),
        };
        self.held = Some(Batch {
            index,
            samples: std::mem::take(&mut self.samples),
            data: self.kind.finish(std::mem::take(&mut self.data)),
            cursor: Cursor::in_lane(self.identity.clone(), lane),
            skipped: Vec::new(),
            finished_shards: Vec::new(),
        });
        if self.sequential {
            return Ok(());
        }
        self.release_held()
    }

    /// Delivers the held batch, with the samples skipped and the shards finished so far.
    fn release_held(&mut self) -> Result<(), Closed> {
        let Some(mut batch) = self.held.take() else {
            return Ok(());
        };
        batch.skipped = std::mem::take(&mut self.skipped);
        batch.finished_shards = std::mem::take(&mut self.finished);
        self.stage.add_items(1);
        self.delivered = true;
        self.out.batches.send_blocking(Ok(batch), &self.stage)
    }
}
