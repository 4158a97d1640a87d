//! The registry's numbers at one moment or over a while, and what they say of the whole.

use std::collections::BTreeMap;

use serde::Serialize;

use super::metrics::Stage;

/// The registry's numbers at one moment, or between two.
#[derive(Debug, Clone, Serialize)]
pub struct FlowSnapshot {
    /// Seconds since the first stage came, or between the two moments.
    pub seconds: f64,
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
    /// Time working. For fetch that is waiting for the network.
    pub busy_seconds: f64,
    /// Time waiting for input.
    pub starved_seconds: f64,
    /// Time waiting for room in the output.
    pub blocked_seconds: f64,
    /// Processor time of the stage's own threads while they worked: less than `busy_seconds` where
    /// threads share cores. Fetch has none, and what a stage gives to other threads isn't in it. 0
    /// unless it is counted ([`super::FlowMetrics::count_cpu`]).
    pub cpu_seconds: f64,
}

/// A channel's fill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ChannelSnapshot {
    /// Items waiting.
    pub items: u64,
    /// Most items it holds.
    pub capacity: u64,
    /// How many of the channels of this name hold nothing.
    pub empty: u64,
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

    fn since(&self, earlier: &Self) -> Self {
        Self {
            stage: self.stage,
            items: self.items.saturating_sub(earlier.items),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            busy_seconds: (self.busy_seconds - earlier.busy_seconds).max(0.0),
            starved_seconds: (self.starved_seconds - earlier.starved_seconds).max(0.0),
            blocked_seconds: (self.blocked_seconds - earlier.blocked_seconds).max(0.0),
            cpu_seconds: (self.cpu_seconds - earlier.cpu_seconds).max(0.0),
        }
    }
}

impl FlowSnapshot {
    /// The numbers of one stage.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> &StageSnapshot {
        &self.stages[stage as usize]
    }

    /// What came to pass between an earlier moment and this one; the channels are as they are now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let stages = self.stages.iter().zip(&earlier.stages);
        let less = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| {
            let before = |name: &String| then.get(name).copied().unwrap_or_default();
            now.iter()
                .map(|(name, count)| (name.clone(), count.saturating_sub(before(name))))
                .filter(|(_, count)| *count > 0)
                .collect()
        };
        Self {
            seconds: (self.seconds - earlier.seconds).max(0.0),
            stages: stages.map(|(now, then)| now.since(then)).collect(),
            channels: self.channels.clone(),
            skipped: less(&self.skipped, &earlier.skipped),
            s3_requests: less(&self.s3_requests, &earlier.s3_requests),
            s3_retries: less(&self.s3_retries, &earlier.s3_retries),
        }
    }

    /// The stage that holds the rest back: the one whose threads wait least for others. A stage that
    /// was there for less than a tenth of the time, as fetching a few small shards is, can't be it.
    /// `None` before anything ran.
    #[must_use]
    pub fn limiting_stage(&self) -> Option<Stage> {
        // Against the clock and not against another stage's time: that is summed over its threads,
        // and a stage of one thread would vanish beside one of sixteen.
        let present = |stage: &&StageSnapshot| stage.total_seconds() >= self.seconds / 10.0;
        self.stages
            .iter()
            .filter(present)
            .filter_map(|stage| Some((stage.stage, stage.busy_share()?)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(stage, _)| stage)
    }

    /// The stage that hangs when nothing comes any more: the one behind the last channel that still
    /// holds something, or fetch. `consumer` is the last stage.
    #[must_use]
    pub fn hanging_stage(&self, consumer: Stage) -> Stage {
        let channel = |name: &str| self.channels.get(name).copied().unwrap_or_default();
        let one = [
            ("encoded", consumer),
            ("encode", Stage::Encode),
            ("batches", Stage::Encode),
            ("decoded", Stage::Decode),
            ("decode", Stage::Decode),
        ];
        if let Some((_, stage)) = one.iter().find(|(name, _)| channel(name).items > 0) {
            return *stage;
        }
        // Shards are read several at once and taken in turn: the others are full while one hangs.
        let many = [("samples", Stage::Shuffle), ("chunks", Stage::Untar)];
        let full = |name: &str| channel(name).items > 0 && channel(name).empty == 0;
        many.iter()
            .find(|(name, _)| full(name))
            .map_or(Stage::Fetch, |&(_, stage)| stage)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FlowMetrics, channel};
    use super::*;
    use std::time::Duration;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_stage_that_never_waits_is_the_limit() {
        let metrics = FlowMetrics::new();
        assert_eq!(metrics.snapshot().limiting_stage(), None);
        let fetch = metrics.stage(Stage::Fetch);
        fetch.add_busy(seconds(1));
        fetch.add_blocked(seconds(3));
        let decode = metrics.stage(Stage::Decode);
        decode.add_busy(seconds(30));
        decode.add_starved(seconds(2));
        assert_eq!(metrics.snapshot().limiting_stage(), Some(Stage::Decode));
    }

    #[test]
    fn one_thread_counts_beside_many_and_a_moment_does_not() {
        let metrics = FlowMetrics::new();
        metrics.stage(Stage::Fetch).add_busy(seconds(5));
        let decode = metrics.stage(Stage::Decode);
        decode.add_busy(seconds(400));
        decode.add_blocked(seconds(1200));
        let train = metrics.stage(Stage::Train);
        train.add_busy(seconds(90));
        train.add_starved(seconds(10));
        let mut snapshot = metrics.snapshot();
        snapshot.seconds = 100.0;
        assert_eq!(snapshot.limiting_stage(), Some(Stage::Train));
    }

    #[test]
    fn a_while_is_what_lies_between_two_moments() {
        let metrics = FlowMetrics::new();
        let (decode, train) = (metrics.stage(Stage::Decode), metrics.stage(Stage::Train));
        // At the start everything waits for the first pictures.
        decode.add_busy(seconds(50));
        train.add_starved(seconds(50));
        metrics.skip("no_image");
        let start = metrics.snapshot();
        decode.add_busy(seconds(2));
        decode.add_blocked(seconds(8));
        decode.add_items(3);
        train.add_busy(seconds(10));
        metrics.skip("bad_json");
        let end = metrics.snapshot();
        assert_eq!(end.limiting_stage(), Some(Stage::Decode));
        let between = end.since(&start);
        assert_eq!(between.limiting_stage(), Some(Stage::Train));
        assert_eq!(between.stage(Stage::Decode).items, 3);
        assert_eq!(
            between.skipped,
            BTreeMap::from([("bad_json".to_owned(), 1)])
        );
    }

    #[test]
    fn what_hangs_is_behind_the_last_thing_that_waits() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Fetch);
        let hangs = || metrics.snapshot().hanging_stage(Stage::Write);
        assert_eq!(hangs(), Stage::Fetch);
        let (first, one) = channel::<u8>(&metrics, "samples", 4);
        let (second, _two) = channel::<u8>(&metrics, "samples", 4);
        first.send_blocking(1, &stage).unwrap();
        // The other shard's turn has come, and nothing of it is there.
        assert_eq!(hangs(), Stage::Fetch);
        let (chunks, _bytes) = channel::<u8>(&metrics, "chunks", 4);
        chunks.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Untar);
        second.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Shuffle);
        let (decoded, _last) = channel::<u8>(&metrics, "decoded", 4);
        decoded.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Decode);
        let (encoded, _out) = channel::<u8>(&metrics, "encoded", 4);
        encoded.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Write);
        drop(one);
    }
}
