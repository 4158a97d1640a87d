//! The stage clock: what each stage did, and how long it worked and waited.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::snapshot::{ChannelSnapshot, FlowSnapshot, StageSnapshot};
use crate::metrics::EventCounter;

#[derive(Debug, Default)]
struct Counters {
    items: AtomicU64,
    bytes: AtomicU64,
    busy_ns: AtomicU64,
    starved_ns: AtomicU64,
    blocked_ns: AtomicU64,
    cpu_ns: AtomicU64,
}

/// Reads a channel's fill for a snapshot; `None` once the channel is closed and dropped.
type Probe = Box<dyn Fn() -> Option<usize> + Send>;

struct WatchedChannel {
    name: &'static str,
    capacity: usize,
    probe: Probe,
}

struct Registry {
    /// When the first handle was given out.
    begun: OnceLock<Instant>,
    counts_cpu: AtomicBool,
    /// Names of the stages, in the order of the data.
    names: &'static [&'static str],
    /// One entry a name.
    stages: Box<[Counters]>,
    channels: Mutex<Vec<WatchedChannel>>,
    skipped: EventCounter,
    truncated_captions: AtomicU64,
}

/// The registry that stages report to. Cloning is cheap and shares it.
#[derive(Clone)]
pub struct FlowMetrics(Arc<Registry>);

impl fmt::Debug for FlowMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlowMetrics")
            .field(&self.snapshot())
            .finish()
    }
}

// A panic in another thread leaves the list whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl FlowMetrics {
    /// An empty registry of these stages, in the order of the data. `skipped` counts the items that
    /// stages leave out.
    pub(crate) fn with_stages(names: &'static [&'static str], skipped: EventCounter) -> Self {
        Self(Arc::new(Registry {
            begun: OnceLock::new(),
            counts_cpu: AtomicBool::new(false),
            names,
            stages: names.iter().map(|_| Counters::default()).collect(),
            channels: Mutex::default(),
            skipped,
            truncated_captions: AtomicU64::new(0),
        }))
    }

    /// Counts the processor time of the stages' threads as well, from now on. Off by default: reading
    /// it may take a microsecond, which shows with small samples.
    pub fn count_cpu(&self) {
        self.0.counts_cpu.store(true, Ordering::Relaxed);
    }

    /// The handle under which the stage at `index` reports.
    pub(crate) fn handle(&self, index: usize) -> StageHandle {
        self.0.begun.get_or_init(Instant::now);
        StageHandle {
            metrics: self.clone(),
            index,
        }
    }

    /// Counts one item left out for `reason`.
    pub fn skip(&self, reason: &str) {
        self.0.skipped.add(reason.to_owned());
    }

    /// Counts captions that have more tokens than the text encoder takes, and were cut.
    pub fn add_truncated_captions(&self, count: u64) {
        self.0
            .truncated_captions
            .fetch_add(count, Ordering::Relaxed);
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
        channels.push(WatchedChannel {
            name,
            capacity,
            probe: Box::new(probe),
        });
    }

    /// The numbers so far.
    #[must_use]
    pub fn snapshot(&self) -> FlowSnapshot {
        let seconds =
            |ns: &AtomicU64| Duration::from_nanos(ns.load(Ordering::Relaxed)).as_secs_f64();
        let stages = self.0.names.iter().zip(&self.0.stages);
        let stages = stages
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
        let begun = self.0.begun.get();
        FlowSnapshot {
            seconds: begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64()),
            stages,
            channels: channels
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect(),
            skipped: self.0.skipped.counts(),
            truncated_captions: self.0.truncated_captions.load(Ordering::Relaxed),
        }
    }
}

/// When a thread began to work, by wall clock and processor time.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    wall: Instant,
    cpu: Option<Duration>,
}

/// Processor time used by this thread.
fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// Records the work and the waits of one stage.
#[derive(Debug, Clone)]
pub struct StageHandle {
    metrics: FlowMetrics,
    index: usize,
}

impl StageHandle {
    fn counters(&self) -> &Counters {
        &self.metrics.0.stages[self.index]
    }

    /// The stage's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.metrics.0.names[self.index]
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

    /// Marks the moment at which this thread begins to work.
    #[must_use]
    pub fn begin(&self) -> Moment {
        let counts_cpu = self.metrics.0.counts_cpu.load(Ordering::Relaxed);
        Moment {
            wall: Instant::now(),
            cpu: counts_cpu.then(thread_cpu_time),
        }
    }

    /// Counts the time since `begun`, on the same thread, less the time `waited`, as working.
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
    use crate::stages::Stage;

    #[test]
    fn sleep_counts_as_work_without_cpu_time() {
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
    fn channel_leaves_the_snapshot_with_its_ends() {
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
