//! The decode limit: the speed of all cores that decode the stream's samples from memory, without reading shards,
//! channels and order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::config::{Content, LaneConfig, StreamConfig};
use super::decode::DecodeWorker;
use super::error::StreamError;
use super::event::{DecodeJob, StreamEvent};
use super::interleave::Interleaver;
use super::kinds::{Images, Latents, SampleKind};
use super::reader::ReaderContext;
use crate::flow::{FlowMetrics, ordered_map};
use crate::panic::panic_message;
use crate::source::Sources;
use crate::stages::{DECODE_CHANNELS, Stage};

/// Most compressed data held at once. Bytes.
const MAX_HELD_BYTES: usize = 512 << 20;
/// Jobs in flight while samples are collected.
const WINDOW: usize = 16;

/// A measurement of the decode limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeLimit {
    /// Images decoded, resized and cropped.
    pub images: u64,
    /// Threads, one per core.
    pub threads: usize,
    /// Wall-clock time.
    pub elapsed: Duration,
    /// Processor time of all threads. Meaningful also on a machine shared with other processes.
    pub cpu: Duration,
}

/// Reads the first samples that a stream of `config` would give, at most `samples` and 512 MB, and then measures how
/// fast all cores decode, resize and crop them.
///
/// # Errors
/// The stream's errors, and [`StreamError::Threads`].
pub fn decode_limit(
    config: &StreamConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
) -> Result<DecodeLimit, StreamError> {
    match config.content {
        Content::Images => measure(&Images::new(config), config, sources, runtime, samples),
        Content::Latents(shapes) => {
            measure(&Latents::new(shapes), config, sources, runtime, samples)
        }
    }
}

fn measure<K: SampleKind>(
    kind: &K,
    config: &StreamConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
) -> Result<DecodeLimit, StreamError> {
    let jobs = collect(kind, config, sources, runtime, samples)?;
    let images = jobs.len() as u64;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = Mutex::new(jobs.into_iter());
    let metrics = FlowMetrics::private();
    metrics.count_cpu();
    let stage = metrics.stage(Stage::Decode);
    let worker = DecodeWorker::new(kind.clone(), config, stage.clone());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads_running: Vec<_> = (0..threads)
            .map(|_| {
                let mut worker = worker.clone();
                let (jobs, stage) = (&jobs, stage.clone());
                let next = || lock(jobs).next();
                scope.spawn(move || {
                    stage.work(|| {
                        while let Some(job) = next() {
                            std::hint::black_box(worker.decode(job));
                        }
                    });
                })
            })
            .collect();
        for thread in threads_running {
            thread.join().map_err(|payload| StreamError::Panicked {
                stage: Stage::Decode,
                message: panic_message(payload.as_ref()),
            })?;
        }
        Ok(DecodeLimit {
            images,
            threads,
            elapsed: start.elapsed(),
            cpu: Duration::from_secs_f64(metrics.snapshot().stage(Stage::Decode).cpu_seconds),
        })
    })
}

/// The jobs that a stream would give its decode threads, in the order of each lane.
fn collect<K: SampleKind>(
    kind: &K,
    config: &StreamConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
) -> Result<Vec<DecodeJob<K>>, StreamError> {
    config.validate()?;
    let hosted = config.lanes.hosted.clone();
    let (lanes, mut jobs) = (hosted.len() as u64, Vec::new());
    let most = MAX_HELD_BYTES / hosted.len();
    for lane in hosted {
        let lane = config.lane(lane);
        let wanted = samples.div_ceil(lanes);
        jobs.extend(collect_lane(
            kind, config, lane, sources, runtime, wanted, most,
        )?);
    }
    jobs.truncate(usize::try_from(samples).unwrap_or(usize::MAX));
    Ok(jobs)
}

/// The first jobs of a lane: `samples`, or fewer that have `most_bytes`.
fn collect_lane<K: SampleKind>(
    kind: &K,
    config: &StreamConfig,
    lane: LaneConfig,
    sources: &Sources,
    runtime: &Handle,
    samples: u64,
    most_bytes: usize,
) -> Result<Vec<DecodeJob<K>>, StreamError> {
    let metrics = FlowMetrics::private();
    let cancel = CancellationToken::new();
    let held = Arc::new(Mutex::new(HeldJobs {
        jobs: Vec::new(),
        bytes: 0,
    }));
    let keep = || {
        let held = Arc::clone(&held);
        move |job: DecodeJob<K>| {
            let mut held = lock(&held);
            held.bytes += job.sample.bytes();
            held.jobs.push(job);
            // Any event: it only shows the progress of the thread.
            StreamEvent::<K>::EpochDone { read: 0 }
        }
    };
    let stage = metrics.stage(Stage::Decode);
    // One thread keeps the jobs in order.
    let (mut ends, mut threads) =
        ordered_map(&metrics, &stage, DECODE_CHANNELS, 1, WINDOW, 1, keep)
            .map_err(|error| StreamError::threads(&error))?;
    let Some((events, results)) = ends.pop() else {
        return Ok(Vec::new());
    };
    let context = ReaderContext {
        sources: sources.clone(),
        metrics: metrics.clone(),
        runtime: runtime.clone(),
        held: config.held_members(),
        inspects: false,
    };
    let stop = cancel.clone();
    let interleaver = Interleaver::new(kind.clone(), config, lane, context, events, stop);
    let thread = std::thread::Builder::new()
        .name("interleave".to_owned())
        .spawn(move || interleaver.run());
    threads.push(thread.map_err(|error| StreamError::threads(&error))?);
    let is_enough = || {
        let held = lock(&held);
        held.jobs.len() as u64 >= samples || held.bytes >= most_bytes
    };
    let mut failed = None;
    while !is_enough() && failed.is_none() {
        failed = match results.recv(&stage) {
            None => break,
            Some(Ok(StreamEvent::Failed(error))) => Some(error),
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
        // A panic was reported as an event.
        thread.join().ok();
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let mut jobs = std::mem::take(&mut lock(&held).jobs);
    jobs.truncate(usize::try_from(samples).unwrap_or(usize::MAX));
    Ok(jobs)
}

/// Collected jobs.
struct HeldJobs<K: SampleKind> {
    jobs: Vec<DecodeJob<K>>,
    bytes: usize,
}

// A poisoned list is valid: a thread only pushes to it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
