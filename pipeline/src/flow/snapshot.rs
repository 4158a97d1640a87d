//! The registry's numbers at one moment or over a period, and the stage that limits the others.

use std::collections::BTreeMap;

use serde::Serialize;

/// The registry's numbers at one moment, or between two.
#[derive(Debug, Clone, Serialize)]
pub struct FlowSnapshot {
    /// Seconds since the first stage began, or between the two moments.
    pub seconds: f64,
    /// One entry a stage, in the order of the data, also for stages that never ran.
    pub stages: Vec<StageSnapshot>,
    /// Fill and capacity by channel name, summed over channels of one name.
    pub channels: BTreeMap<String, ChannelSnapshot>,
    /// Samples left out, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Captions that have more tokens than the text encoder takes, and were cut.
    #[serde(skip)]
    pub truncated_captions: u64,
}

/// One stage's numbers; times are summed over its threads.
#[derive(Debug, Clone, Serialize)]
pub struct StageSnapshot {
    /// The stage's name.
    pub stage: &'static str,
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
    /// threads share cores. Fetch has no threads of its own; work that a stage hands to other threads is
    /// not included. 0 unless it is counted ([`super::FlowMetrics::count_cpu`]).
    pub cpu_seconds: f64,
}

/// A channel's fill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ChannelSnapshot {
    /// Items waiting.
    pub items: u64,
    /// Most items it holds.
    pub capacity: u64,
    /// Channels of this name that are empty.
    pub empty: u64,
}

impl StageSnapshot {
    /// The part of its time this stage worked, 0 to 1; `None` if it never ran.
    #[must_use]
    pub fn busy_share(&self) -> Option<f64> {
        (self.busy_seconds > 0.0).then(|| self.busy_seconds / self.total_seconds())
    }

    /// Time working and waiting.
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
    /// The difference between an earlier moment and this one; the channels are as they are now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let stages = self.stages.iter().zip(&earlier.stages);
        let before = |reason| earlier.skipped.get(reason).copied().unwrap_or_default();
        let skipped = self
            .skipped
            .iter()
            .map(|(reason, count)| (reason.clone(), count.saturating_sub(before(reason))))
            .filter(|(_, count)| *count > 0)
            .collect();
        Self {
            seconds: (self.seconds - earlier.seconds).max(0.0),
            stages: stages.map(|(now, then)| now.since(then)).collect(),
            channels: self.channels.clone(),
            skipped,
            truncated_captions: self
                .truncated_captions
                .saturating_sub(earlier.truncated_captions),
        }
    }

    /// Index of the stage whose threads wait least; stages that were active for less than a tenth of
    /// the time are left out.
    pub(crate) fn limiting_index(&self) -> Option<usize> {
        // Compared with the clock and not with another stage's time: that is a sum over threads, and a
        // stage of one thread would vanish beside a stage of sixteen.
        let active = |stage: &StageSnapshot| stage.total_seconds() >= self.seconds / 10.0;
        let stages = self.stages.iter().enumerate();
        stages
            .filter(|(_, stage)| active(stage))
            .filter_map(|(index, stage)| Some((index, stage.busy_share()?)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::FlowMetrics;
    use super::*;
    use crate::stages::Stage;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn limit_is_the_stage_that_never_waits() {
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
    fn snapshot_difference_covers_the_period() {
        let metrics = FlowMetrics::new();
        let (decode, train) = (metrics.stage(Stage::Decode), metrics.stage(Stage::Train));
        // At the start everything waits for the first pictures.
        decode.add_busy(seconds(50));
        train.add_starved(seconds(50));
        metrics.skip("no_image");
        metrics.add_truncated_captions(2);
        let start = metrics.snapshot();
        decode.add_busy(seconds(2));
        decode.add_blocked(seconds(8));
        decode.add_items(3);
        train.add_busy(seconds(10));
        metrics.skip("bad_json");
        metrics.add_truncated_captions(3);
        let end = metrics.snapshot();
        assert_eq!(end.limiting_stage(), Some(Stage::Decode));
        let between = end.since(&start);
        assert_eq!(between.limiting_stage(), Some(Stage::Train));
        assert_eq!(between.stage(Stage::Decode).items, 3);
        assert_eq!((between.truncated_captions, end.truncated_captions), (3, 5));
        assert_eq!(
            between.skipped,
            BTreeMap::from([("bad_json".to_owned(), 1)])
        );
    }
}
