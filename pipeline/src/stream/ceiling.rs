//! How fast this machine could be: the same samples, decoded, resized and cropped (or read) from memory by all
//! cores, with no shards, channels or order around it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::config::StreamConfig;
use super::error::StreamError;
use super::interleave::Interleaver;
use super::prepare::Preparer;
use super::reader::ReaderContext;
use super::step::{Job, Step};
use crate::flow::{FlowMetrics, ordered_map};
use crate::panic::panic_message;
use crate::source::Sources;
use crate::stages::{DECODE_CHANNELS, Stage};

/// Compressed images held at once, at most. Bytes.
const HELD_BYTES: usize = 512 << 20;
/// Jobs on their way while samples are collected.
const WINDOW: usize = 16;

/// What the cores did alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceiling {
    /// Images decoded, resized and cropped.
    pub images: u64,
    /// Threads that did so, one a core.
    pub threads: usize,
    /// How long it took.
    pub elapsed: Duration,
    /// Processor time it took, on all threads together: also on a machine that others use.
    pub cpu: Duration,
}

/// Reads the first samples a stream of `config` would give, at most `samples` and 512 MB of images, and
/// then measures how fast all cores decode, resize and crop them.
///
/// # Errors
/// As the stream's, and if no thread can be started.
pub fn ceiling(
    config: &StreamConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
) -> Result<Ceiling, StreamError> {
    let jobs = collect(config, sources, runtime, samples)?;
    let images = jobs.len() as u64;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = Mutex::new(jobs.into_iter());
    let metrics = FlowMetrics::private();
    metrics.count_cpu();
    let stage = metrics.stage(Stage::Decode);
    let preparer = Preparer::new(config, stage.clone());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let mut preparer = preparer.clone();
                let (jobs, stage) = (&jobs, stage.clone());
                let next = || lock(jobs).next();
                scope.spawn(move || {
                    stage.work(|| {
                        while let Some(job) = next() {
                            std::hint::black_box(preparer.prepare(job));
                        }
                    });
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|payload| StreamError::Panicked {
                stage: Stage::Decode,
                message: panic_message(payload.as_ref()),
            })?;
        }
        Ok(Ceiling {
            images,
            threads,
            elapsed: start.elapsed(),
            cpu: Duration::from_secs_f64(metrics.snapshot().stage(Stage::Decode).cpu_seconds),
        })
    })
}

/// The jobs a stream would give its decode threads, in its order.
fn collect(
    config: &StreamConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
) -> Result<Vec<Job>, StreamError> {
    config.validate()?;
    let metrics = FlowMetrics::private();
    let cancel = CancellationToken::new();
    let held = Arc::new(Mutex::new(Held::default()));
    let keep = || {
        let held = Arc::clone(&held);
        move |job: Job| {
            let mut held = lock(&held);
            held.bytes += job.chosen.members.bytes();
            held.jobs.push(job);
            // Any step: they only tell how far the thread has come.
            Step::EpochDone { read: 0 }
        }
    };
    let stage = metrics.stage(Stage::Decode);
    // One thread keeps them in order.
    let (steps, results, mut threads) =
        ordered_map(&metrics, &stage, DECODE_CHANNELS, 1, WINDOW, keep)
            .map_err(|error| StreamError::threads(&error))?;
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: metrics.clone(),
        runtime: runtime.clone(),
        max_member_bytes: config.image.max_bytes,
        notes: None,
    };
    let interleaver = Interleaver::new(config.clone(), context, steps, cancel.clone());
    let order = std::thread::Builder::new()
        .name("order".to_owned())
        .spawn(move || interleaver.run());
    threads.push(order.map_err(|error| StreamError::threads(&error))?);
    let enough = || {
        let held = lock(&held);
        held.jobs.len() as u64 >= samples || held.bytes >= HELD_BYTES
    };
    let mut failed = None;
    while !enough() && failed.is_none() {
        failed = match results.recv(&stage) {
            None => break,
            Some(Ok(Step::Failed(error))) => Some(error),
            Some(Ok(_)) => None,
            Some(Err(message)) => Some(StreamError::Panicked {
                stage: Stage::Decode,
                message,
            }),
        };
    }
    cancel.cancel();
    drop(results);
    for thread in threads {
        // Its panic came out of the steps.
        let _panicked = thread.join();
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let mut jobs = std::mem::take(&mut lock(&held).jobs);
    jobs.truncate(usize::try_from(samples).unwrap_or(usize::MAX));
    Ok(jobs)
}

/// What was collected.
#[derive(Default)]
struct Held {
    jobs: Vec<Job>,
    bytes: usize,
}

// Only pushed to: whole, whatever happened to a thread that held it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
