//! What every stage did and how long it worked and waited: one registry shared by the whole process.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

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

    /// The handle under which `stage` reports. Any number of threads may hold one.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> StageHandle {
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
            })
            .collect();
        let mut channels = BTreeMap::<&'static str, ChannelSnapshot>::new();
        for channel in lock(&self.0.channels).iter() {
            if let Some(items) = (channel.probe)() {
                let total = channels.entry(channel.name).or_default();
                total.items += items as u64;
                total.capacity += channel.capacity as u64;
            }
        }
        let owned = |map: &Mutex<BTreeMap<&'static str, u64>>| {
            lock(map).iter().map(|(&k, &v)| (k.to_owned(), v)).collect()
        };
        FlowSnapshot {
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

    /// The stage that holds the rest back, as [`FlowSnapshot::limiting_stage`] now.
    #[must_use]
    pub fn limiting_stage(&self) -> Option<Stage> {
        self.snapshot().limiting_stage()
    }
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
        let start = Instant::now();
        let result = work();
        self.add_busy(start.elapsed());
        result
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

/// The registry's numbers at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct FlowSnapshot {
    /// One entry a stage, in the order of the data, also for stages that never ran.
    pub stages: Vec<StageSnapshot>,
    /// Fill and capacity by channel name, summed over channels of one name.
    pub channels: BTreeMap<String, ChannelSnapshot>,
    /// Samples left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// S3 requests by outcome.
    pub s3_requests: BTreeMap<String, u64>,
    /// Repeated S3 requests by reason.
    pub s3_retries: BTreeMap<String, u64>,
}

/// One stage's numbers; times are summed over its threads.
#[derive(Debug, Clone, Serialize)]
pub struct StageSnapshot {
    /// Which stage.
    pub stage: Stage,
    /// Finished items.
    pub items: u64,
    /// Bytes that passed.
    pub bytes: u64,
    /// Time working.
    pub busy_seconds: f64,
    /// Time waiting for input.
    pub starved_seconds: f64,
    /// Time waiting for room in the output.
    pub blocked_seconds: f64,
}

/// A channel's fill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ChannelSnapshot {
    /// Items waiting.
    pub items: u64,
    /// Most items it holds.
    pub capacity: u64,
}

impl StageSnapshot {
    /// The part of its time this stage worked, 0 to 1; `None` if it never ran.
    #[must_use]
    pub fn busy_share(&self) -> Option<f64> {
        (self.busy_seconds > 0.0).then(|| self.busy_seconds / self.total_seconds())
    }

    /// Working and waiting, together.
    #[must_use]
    pub fn total_seconds(&self) -> f64 {
        self.busy_seconds + self.starved_seconds + self.blocked_seconds
    }
}

impl FlowSnapshot {
    /// The numbers of one stage.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> &StageSnapshot {
        &self.stages[stage as usize]
    }

    /// The stage that holds the rest back: the one whose threads wait least for others. A stage that
    /// was hardly there, as fetching a few small shards is, can't be it. `None` before anything ran.
    #[must_use]
    pub fn limiting_stage(&self) -> Option<Stage> {
        let longest = self
            .stages
            .iter()
            .map(StageSnapshot::total_seconds)
            .fold(0.0, f64::max);
        self.stages
            .iter()
            .filter(|stage| stage.total_seconds() >= longest / 10.0)
            .filter_map(|stage| Some((stage.stage, stage.busy_share()?)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(stage, _)| stage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stage_that_never_waits_is_the_limit() {
        let metrics = FlowMetrics::new();
        assert_eq!(metrics.limiting_stage(), None);
        let fetch = metrics.stage(Stage::Fetch);
        fetch.add_busy(Duration::from_secs(1));
        fetch.add_blocked(Duration::from_secs(3));
        let decode = metrics.stage(Stage::Decode);
        decode.add_busy(Duration::from_secs(30));
        decode.add_starved(Duration::from_secs(2));
        assert_eq!(metrics.limiting_stage(), Some(Stage::Decode));
    }

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
    fn channels_vanish_with_their_ends() {
        let metrics = FlowMetrics::new();
        let (sender, receiver) = super::super::channel::<u8>(&metrics, "decoded", 4);
        sender
            .send_blocking(1, &metrics.stage(Stage::Decode))
            .unwrap();
        let snapshot = metrics.snapshot();
        assert_eq!(
            snapshot.channels["decoded"],
            ChannelSnapshot {
                items: 1,
                capacity: 4
            }
        );
        drop((sender, receiver));
        assert!(metrics.snapshot().channels.is_empty());
    }
}
