//! What every stage did and how long it worked and waited: one registry shared by the whole process.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::snapshot::{ChannelSnapshot, FlowSnapshot, StageSnapshot};

/// The stages a sample passes, in that order. The last three belong to the trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Bytes from S3, HTTP or disk. An item is an object read to its end.
    Fetch,
    /// Tar members to samples.
    Untar,
    /// Choosing by the sample's json.
    Filter,
    /// The seeded shuffle buffer.
    Shuffle,
    /// Decoding, resizing and cropping.
    Decode,
    /// Collecting samples into batches. An item is a batch.
    Batch,
    /// Pixels and captions to latents and embeddings.
    Encode,
    /// The training step.
    Train,
    /// Writing latent shards.
    Write,
}

impl Stage {
    /// Every stage, in the order of the data.
    pub const ALL: [Self; 9] = [
        Self::Fetch,
        Self::Untar,
        Self::Filter,
        Self::Shuffle,
        Self::Decode,
        Self::Batch,
        Self::Encode,
        Self::Train,
        Self::Write,
    ];

    /// The name used in metrics and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Untar => "untar",
            Self::Filter => "filter",
            Self::Shuffle => "shuffle",
            Self::Decode => "decode",
            Self::Batch => "batch",
            Self::Encode => "encode",
            Self::Train => "train",
            Self::Write => "write",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Default)]
struct Counters {
    items: AtomicU64,
    bytes: AtomicU64,
    busy_ns: AtomicU64,
    starved_ns: AtomicU64,
    blocked_ns: AtomicU64,
    cpu_ns: AtomicU64,
}

/// A channel's fill, asked for when a snapshot is taken; `None` once the channel is gone.
type Probe = Box<dyn Fn() -> Option<usize> + Send>;

struct Watched {
    name: &'static str,
    capacity: usize,
    probe: Probe,
}

#[derive(Default)]
struct Inner {
    /// When the first stage came.
    begun: OnceLock<Instant>,
    counts_cpu: AtomicBool,
    stages: [Counters; Stage::ALL.len()],
    channels: Mutex<Vec<Watched>>,
    skipped: Mutex<BTreeMap<String, u64>>,
    requests: Mutex<BTreeMap<&'static str, u64>>,
    retries: Mutex<BTreeMap<&'static str, u64>>,
}

/// The registry. Cloning is cheap and shares it.
#[derive(Clone, Default)]
pub struct FlowMetrics(Arc<Inner>);

impl fmt::Debug for FlowMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlowMetrics")
            .field(&self.snapshot())
            .finish()
    }
}

// A panic in another thread leaves plain counters behind: they stay usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl FlowMetrics {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts the processor time of the stages' threads as well, from now on. Off unless asked for:
    /// where the system takes a microsecond to say it, small samples would feel it.
    pub fn count_cpu(&self) {
        self.0.counts_cpu.store(true, Ordering::Relaxed);
    }

    /// The handle under which `stage` reports. Any number of threads may hold one.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> StageHandle {
        self.0.begun.get_or_init(Instant::now);
        StageHandle {
            metrics: self.clone(),
            stage,
        }
    }

    /// Counts one sample left out for `reason`.
    pub fn skip(&self, reason: &str) {
        let mut skipped = lock(&self.0.skipped);
        match skipped.get_mut(reason) {
            Some(count) => *count += 1,
            None => {
                skipped.insert(reason.to_owned(), 1);
            }
        }
    }

    /// Counts one S3 request by its outcome (`ok`, `not_found`, `server_error` …).
    pub fn s3_request(&self, outcome: &'static str) {
        *lock(&self.0.requests).entry(outcome).or_default() += 1;
    }

    /// Counts one repeated S3 request by why it had to be repeated.
    pub fn s3_retry(&self, reason: &'static str) {
        *lock(&self.0.retries).entry(reason).or_default() += 1;
    }

    pub(crate) fn watch_channel<T: Send + 'static>(
        &self,
        name: &'static str,
        capacity: usize,
        sender: &async_channel::Sender<T>,
    ) {
        let weak = sender.downgrade();
        let probe = move || weak.upgrade().map(|sender| sender.len());
        let mut channels = lock(&self.0.channels);
        channels.retain(|channel| (channel.probe)().is_some());
        channels.push(Watched {
            name,
            capacity,
            probe: Box::new(probe),
        });
    }

    /// Everything counted so far, as plain numbers.
    #[must_use]
    pub fn snapshot(&self) -> FlowSnapshot {
        let seconds =
            |ns: &AtomicU64| Duration::from_nanos(ns.load(Ordering::Relaxed)).as_secs_f64();
        let stages = Stage::ALL
            .iter()
            .zip(&self.0.stages)
            .map(|(&stage, counters)| StageSnapshot {
                stage,
                items: counters.items.load(Ordering::Relaxed),
                bytes: counters.bytes.load(Ordering::Relaxed),
                busy_seconds: seconds(&counters.busy_ns),
                starved_seconds: seconds(&counters.starved_ns),
                blocked_seconds: seconds(&counters.blocked_ns),
                cpu_seconds: seconds(&counters.cpu_ns),
            })
            .collect();
        let mut channels = BTreeMap::<&'static str, ChannelSnapshot>::new();
        for channel in lock(&self.0.channels).iter() {
            if let Some(items) = (channel.probe)() {
                let total = channels.entry(channel.name).or_default();
                total.items += items as u64;
                total.capacity += channel.capacity as u64;
                total.empty += u64::from(items == 0);
            }
        }
        let owned = |map: &Mutex<BTreeMap<&'static str, u64>>| {
            lock(map).iter().map(|(&k, &v)| (k.to_owned(), v)).collect()
        };
        let begun = self.0.begun.get();
        FlowSnapshot {
            seconds: begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64()),
            stages,
            channels: channels
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect(),
            skipped: lock(&self.0.skipped).clone(),
            s3_requests: owned(&self.0.requests),
            s3_retries: owned(&self.0.retries),
        }
    }
}

/// When a thread began to work, on its clocks.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    wall: Instant,
    cpu: Option<Duration>,
}

/// Processor time this thread has used.
fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// A stage's way into the registry.
#[derive(Debug, Clone)]
pub struct StageHandle {
    metrics: FlowMetrics,
    stage: Stage,
}

impl StageHandle {
    fn counters(&self) -> &Counters {
        &self.metrics.0.stages[self.stage as usize]
    }

    /// Which stage this is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The registry this handle belongs to.
    #[must_use]
    pub fn metrics(&self) -> &FlowMetrics {
        &self.metrics
    }

    /// Runs `work` and counts its time as working.
    pub fn work<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = self.begin();
        let result = work();
        self.add_work(begun, Duration::ZERO);
        result
    }

    /// This thread begins to work.
    #[must_use]
    pub fn begin(&self) -> Moment {
        let counts_cpu = self.metrics.0.counts_cpu.load(Ordering::Relaxed);
        Moment {
            wall: Instant::now(),
            cpu: counts_cpu.then(thread_cpu_time),
        }
    }

    /// Counts the time since `begun`, on the same thread, as working, but for what of it was waited.
    pub fn add_work(&self, begun: Moment, waited: Duration) {
        self.add_busy(begun.wall.elapsed().saturating_sub(waited));
        if let Some(before) = begun.cpu {
            let cpu = thread_cpu_time().saturating_sub(before);
            self.counters()
                .cpu_ns
                .fetch_add(nanos(cpu), Ordering::Relaxed);
        }
    }

    /// Counts finished items.
    pub fn add_items(&self, items: u64) {
        self.counters().items.fetch_add(items, Ordering::Relaxed);
    }

    /// Counts bytes that passed.
    pub fn add_bytes(&self, bytes: u64) {
        self.counters().bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts time spent working.
    pub fn add_busy(&self, time: Duration) {
        self.counters()
            .busy_ns
            .fetch_add(nanos(time), Ordering::Relaxed);
    }

    /// Counts time spent waiting for input.
    pub fn add_starved(&self, time: Duration) {
        self.counters()
            .starved_ns
            .fetch_add(nanos(time), Ordering::Relaxed);
    }

    /// Counts time spent waiting for room in the output.
    pub fn add_blocked(&self, time: Duration) {
        self.counters()
            .blocked_ns
            .fetch_add(nanos(time), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_report_under_the_names_of_the_metrics() {
        let snapshot = FlowMetrics::new().snapshot();
        let names: Vec<_> = snapshot.stages.iter().map(|s| s.stage.name()).collect();
        assert_eq!(
            names,
            [
                "fetch", "untar", "filter", "shuffle", "decode", "batch", "encode", "train",
                "write"
            ]
        );
        assert_eq!(
            serde_json::to_value(Stage::Untar).unwrap(),
            serde_json::json!("untar")
        );
    }

    #[test]
    fn sleeping_is_work_without_processor_time() {
        let metrics = FlowMetrics::new();
        metrics
            .stage(Stage::Batch)
            .work(|| std::hint::black_box([0; 100]));
        metrics.count_cpu();
        let (asleep, awake) = (metrics.stage(Stage::Write), metrics.stage(Stage::Decode));
        asleep.work(|| std::thread::sleep(Duration::from_millis(60)));
        awake.work(|| {
            let begun = thread_cpu_time();
            while thread_cpu_time() - begun < Duration::from_millis(60) {}
        });
        let snapshot = metrics.snapshot();
        let (asleep, awake) = (snapshot.stage(Stage::Write), snapshot.stage(Stage::Decode));
        assert_eq!(snapshot.stage(Stage::Batch).cpu_seconds, 0.0);
        assert!(asleep.busy_seconds >= 0.06, "{asleep:?}");
        assert!(asleep.cpu_seconds < 0.03, "{asleep:?}");
        assert!(
            (0.06..=awake.busy_seconds + 0.001).contains(&awake.cpu_seconds),
            "{awake:?}"
        );
    }

    #[test]
    fn channels_vanish_with_their_ends() {
        let metrics = FlowMetrics::new();
        let (sender, receiver) = super::super::channel::<u8>(&metrics, "decoded", 4);
        let (_idle, _waits) = super::super::channel::<u8>(&metrics, "decoded", 4);
        sender
            .send_blocking(1, &metrics.stage(Stage::Decode))
            .unwrap();
        let snapshot = metrics.snapshot();
        assert_eq!(
            snapshot.channels["decoded"],
            ChannelSnapshot {
                items: 1,
                capacity: 8,
                empty: 1,
            }
        );
        drop((sender, receiver, _idle));
        assert!(metrics.snapshot().channels.is_empty());
    }
}
