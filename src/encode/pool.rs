//! Threads that encode, dealt to and collected from in turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use candle_core::Tensor;
use coffey_pipeline::flow::{FlowMetrics, Receiver, Sender, StageHandle, channel};
use coffey_pipeline::order::Cursor;
use coffey_pipeline::stages::{FlowChannel, Stage};
use coffey_pipeline::{Batch, SampleMeta, ShardSummary, SkippedSample, Stream, StreamError};

use super::{EncodeError, Worker};

/// A batch ready for training or for writing, on the CPU.
#[derive(Debug)]
pub struct EncodedBatch {
    /// Its number in the stream, from 0.
    pub index: u64,
    /// What is known of each sample.
    pub samples: Vec<SampleMeta>,
    /// Mean and log-variance of the latents, unscaled: `[B·crops, 2C, h, w]` f32, a sample's crops one after another.
    pub moments: Tensor,
    /// Text embeddings: `[B, 77, width]` f32.
    pub prompt_embeds: Tensor,
    /// The place in the stream right after this batch.
    pub cursor: Cursor,
    /// Samples left out since the batch before, in the order of the stream.
    pub skipped: Vec<SkippedSample>,
    /// Shards of which nothing more will come.
    pub finished_shards: Vec<ShardSummary>,
}

type Encoded = Result<EncodedBatch, EncodeError>;

/// Batches each thread may have finished before they are asked for.
const READY_PER_THREAD: usize = 2;

/// A stream with encoders behind it. Dropping it stops all threads and waits for them.
#[derive(Debug)]
pub struct EncodePool {
    outputs: Vec<Receiver<Encoded>>,
    next: usize,
    ended: bool,
    inputs: Vec<Receiver<Result<Batch, StreamError>>>,
    threads: Vec<JoinHandle<()>>,
    stream: Stream,
}

impl EncodePool {
    /// Starts a thread for each of `workers`, fed by `stream`.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn start(
        stream: Stream,
        workers: Vec<impl Into<Worker>>,
        metrics: &FlowMetrics,
    ) -> Result<Self, EncodeError> {
        let mut pool = Self {
            outputs: Vec::new(),
            next: 0,
            ended: false,
            inputs: Vec::new(),
            threads: Vec::new(),
            stream,
        };
        let mut senders = Vec::new();
        for (i, worker) in workers.into_iter().enumerate() {
            let worker = worker.into();
            let stage = metrics.stage(Stage::Encode);
            let (input, jobs) = channel(metrics, FlowChannel::Encode.name(), 1);
            let (results, output) = channel(metrics, FlowChannel::Encoded.name(), READY_PER_THREAD);
            senders.push(input);
            pool.inputs.push(jobs.clone());
            pool.outputs.push(output);
            let thread = std::thread::Builder::new().name(format!("encode-{i}"));
            pool.threads
                .push(thread.spawn(move || work(&worker, &jobs, &results, &stage))?);
        }
        let batches = pool.stream.batches().clone();
        let stage = metrics.stage(Stage::Batch);
        let deal = std::thread::Builder::new().name("encode-deal".to_owned());
        pool.threads.push(deal.spawn(move || {
            for sender in senders.iter().cycle() {
                let Some(batch) = batches.recv_untimed() else {
                    return;
                };
                if sender.send_blocking(batch, &stage).is_err() {
                    return;
                }
            }
        })?);
        Ok(pool)
    }

    /// The next batch in order; waiting counts as `stage` being starved. `None` at the stream's end, or after
    /// [`Interrupter::interrupt`].
    pub fn next(&mut self, stage: &StageHandle) -> Option<Encoded> {
        if self.ended {
            return None;
        }
        let batch = self.outputs[self.next].recv_blocking(stage);
        self.next = (self.next + 1) % self.outputs.len();
        self.ended = !matches!(batch, Some(Ok(_)));
        batch
    }

    /// A handle that wakes [`Self::next`] from another thread.
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(self.outputs.clone())
    }

    /// The stream behind the pool.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }
}

/// Ends the wait for the next batch.
#[derive(Clone, Debug)]
pub struct Interrupter(Vec<Receiver<Encoded>>);

impl Interrupter {
    /// Closes the pool's outputs: whoever waits for a batch gets none.
    pub fn interrupt(&self) {
        for output in &self.0 {
            output.close();
        }
    }
}

impl Drop for EncodePool {
    fn drop(&mut self) {
        for output in &self.outputs {
            output.close();
        }
        for input in &self.inputs {
            input.close();
        }
        self.stream.batches().close();
        for thread in self.threads.drain(..) {
            let _panicked = thread.join();
        }
    }
}

fn work(
    worker: &Worker,
    jobs: &Receiver<Result<Batch, StreamError>>,
    results: &Sender<Encoded>,
    stage: &StageHandle,
) {
    while let Some(job) = jobs.recv_blocking(stage) {
        let encoded = job.map_err(EncodeError::from).and_then(|batch| {
            let caught = || catch_unwind(AssertUnwindSafe(|| encode(worker, batch)));
            stage.work(caught).unwrap_or(Err(EncodeError::Panicked))
        });
        if let Ok(batch) = &encoded {
            stage.add_items(batch.samples.len() as u64);
        }
        let failed = encoded.is_err();
        if results.send_blocking(encoded, stage).is_err() || failed {
            return;
        }
    }
}

fn encode(worker: &Worker, batch: Batch) -> Encoded {
    let captions: Vec<&str> = batch.samples.iter().map(|s| s.caption.as_str()).collect();
    let [moments, prompt_embeds] = worker.encode(batch.content, &captions)?;
    Ok(EncodedBatch {
        index: batch.index,
        samples: batch.samples,
        moments,
        prompt_embeds,
        cursor: batch.cursor,
        skipped: batch.skipped,
        finished_shards: batch.finished_shards,
    })
}
