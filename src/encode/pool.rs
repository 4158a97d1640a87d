//! Encoder threads, dealt to and collected from in turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use candle_core::Tensor;
use coffey_pipeline::flow::{FlowMetrics, Receiver, Sender, StageHandle, channel};
use coffey_pipeline::order::Cursor;
use coffey_pipeline::stages::{FlowChannel, Stage};
use coffey_pipeline::{Batch, SampleMeta, ShardSummary, SkippedSample, Stream, StreamError};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{EncodeError, EncoderOutput, Encoders};
use crate::models::Conditioning;

/// A batch ready for training or for writing, on the device of the thread that encoded it.
#[derive(Debug)]
pub struct EncodedBatch {
    /// Number of the batch in the stream, from 0.
    pub index: u64,
    /// Caption, size, crop and origin of each sample.
    pub samples: Vec<SampleMeta>,
    /// Mean and log-variance of the latents, unscaled: `[B·crops, 2C, h, w]` f32, a sample's crops one after another.
    pub moments: Tensor,
    /// Conditioning on the captions, `B` samples.
    pub conditioning: Conditioning,
    /// Position in the stream right after this batch.
    pub cursor: Cursor,
    /// Samples skipped since the batch before, in stream order.
    pub skipped: Vec<SkippedSample>,
    /// Shards that were read to their end since the batch before.
    pub finished_shards: Vec<ShardSummary>,
}

type EncodeResult = Result<EncodedBatch, EncodeError>;

/// EncoderOutput batches that each thread may hold ready.
const READY_PER_THREAD: usize = 2;

/// A stream with encoders behind it. Dropping the pool stops all threads and waits for them.
#[derive(Debug)]
pub struct EncodePool {
    outputs: Vec<Receiver<EncodeResult>>,
    next: usize,
    ended: bool,
    inputs: Vec<Receiver<Result<Batch, StreamError>>>,
    threads: Vec<JoinHandle<()>>,
    stream: Stream,
    runtime: Handle,
}

impl EncodePool {
    /// Starts one thread for each of `encoders`, fed by `stream`. Waits run on `runtime`.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn start(
        stream: Stream,
        encoders: Vec<Arc<Encoders>>,
        metrics: &FlowMetrics,
        runtime: &Handle,
    ) -> Result<Self, EncodeError> {
        let mut pool = Self {
            outputs: Vec::new(),
            next: 0,
            ended: false,
            inputs: Vec::new(),
            threads: Vec::new(),
            stream,
            runtime: runtime.clone(),
        };
        let mut senders = Vec::new();
        for (i, encoders) in encoders.into_iter().enumerate() {
            let stage = metrics.stage(Stage::Encode);
            let (input, jobs) = channel(metrics, FlowChannel::Encode.name(), 1);
            let (results, output) = channel(metrics, FlowChannel::Encoded.name(), READY_PER_THREAD);
            senders.push(input);
            pool.inputs.push(jobs.clone());
            pool.outputs.push(output);
            let thread = std::thread::Builder::new().name(format!("encode-{i}"));
            pool.threads
                .push(thread.spawn(move || work(&encoders, &jobs, &results, &stage))?);
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

    /// The next batch in stream order; `None` at the stream's end. The wait counts as `stage` being starved.
    ///
    /// # Errors
    /// [`EncodeError::Cancelled`] once `cancel` is cancelled, [`EncodeError::TimedOut`] after waiting for `timeout`; else the error
    /// that ended the stream or an encoder.
    pub fn next(
        &mut self,
        stage: &StageHandle,
        cancel: &CancellationToken,
        timeout: Duration,
    ) -> Result<Option<EncodedBatch>, EncodeError> {
        if self.ended {
            return Ok(None);
        }
        let output = &self.outputs[self.next];
        let received = self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = cancel.cancelled() => Err(EncodeError::Cancelled),
                received = tokio::time::timeout(timeout, output.recv(stage)) => {
                    received.map_err(|_| EncodeError::TimedOut(timeout))
                }
            }
        });
        self.next = (self.next + 1) % self.outputs.len();
        self.ended = !matches!(received, Ok(Some(Ok(_))));
        received?.transpose()
    }

    /// The stream that feeds the pool.
    pub fn stream(&self) -> &Stream {
        &self.stream
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
            // A panic was caught and sent as an error.
            let _ = thread.join();
        }
    }
}

fn work(
    encoders: &Encoders,
    jobs: &Receiver<Result<Batch, StreamError>>,
    results: &Sender<EncodeResult>,
    stage: &StageHandle,
) {
    while let Some(job) = jobs.recv_blocking(stage) {
        let encoded = job.map_err(EncodeError::from).and_then(|batch| {
            let encode = || encode(encoders, batch, stage.metrics());
            let caught = || catch_unwind(AssertUnwindSafe(encode));
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

fn encode(encoders: &Encoders, batch: Batch, metrics: &FlowMetrics) -> EncodeResult {
    let EncoderOutput {
        moments,
        conditioning,
        truncated,
    } = encoders.encode(batch.data, &batch.samples)?;
    metrics.add_truncated_captions(truncated as u64);
    Ok(EncodedBatch {
        index: batch.index,
        samples: batch.samples,
        moments,
        conditioning,
        cursor: batch.cursor,
        skipped: batch.skipped,
        finished_shards: batch.finished_shards,
    })
}
