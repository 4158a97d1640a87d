//! The stages of a run and the channels between them: the only list of either, for the pipeline and
//! for the trainer.
//!
//! [`flow`](crate::flow) counts by index and knows no stage by name. This file gives the indices their
//! names, and says which stage waits for an item of which channel.

use std::fmt;

use ::metrics::{counter, gauge};
use serde::Serialize;

use crate::flow::{FlowMetrics, FlowSnapshot, OrderedNames, StageHandle, StageSnapshot};
use crate::metrics::{
    CAPTIONS_TRUNCATED, CHANNEL_CAPACITY, CHANNEL_ITEMS, EventCounter, SAMPLES_SKIPPED,
    STAGE_BLOCKED, STAGE_BUSY, STAGE_BYTES, STAGE_ITEMS, STAGE_STARVED,
};

/// The stages a sample passes, in that order. The last three belong to the trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Bytes from S3, HTTP or disk. An item is an object read to its end.
    Fetch,
    /// Tar members to samples.
    Untar,
    /// Selection by the sample's json.
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

    const NAMES: [&'static str; Self::ALL.len()] = {
        let mut names = [""; Self::ALL.len()];
        let mut index = 0;
        while index < names.len() {
            names[index] = Self::ALL[index].name();
            index += 1;
        }
        names
    };

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

/// The channels between the stages, in the order of the data. The last two belong to the trainer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowChannel {
    /// Fetched bytes; one channel for each open shard.
    Chunks,
    /// Samples of a tar; one channel for each open shard.
    Samples,
    /// Selected samples on their way to the decode threads.
    Decode,
    /// A ticket for each sample that is being decoded, in order; one channel for each lane.
    Decoded,
    /// Finished batches; one channel for each lane, and one for all if there are several.
    Batches,
    /// Batches on their way to an encode thread; one channel for each thread.
    Encode,
    /// Encoded batches; one channel for each encode thread.
    Encoded,
}

impl FlowChannel {
    /// Every channel, in the order of the data.
    pub const ALL: [Self; 7] = [
        Self::Chunks,
        Self::Samples,
        Self::Decode,
        Self::Decoded,
        Self::Batches,
        Self::Encode,
        Self::Encoded,
    ];

    /// The name used in metrics and snapshots.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chunks => "chunks",
            Self::Samples => "samples",
            Self::Decode => "decode",
            Self::Decoded => "decoded",
            Self::Batches => "batches",
            Self::Encode => "encode",
            Self::Encoded => "encoded",
        }
    }

    /// The stage that takes items from the channel; `None`: the last stage of the run.
    #[must_use]
    pub const fn consumer(self) -> Option<Stage> {
        match self {
            Self::Chunks => Some(Stage::Untar),
            Self::Samples => Some(Stage::Shuffle),
            Self::Decode => Some(Stage::Decode),
            Self::Decoded => Some(Stage::Batch),
            Self::Batches | Self::Encode => Some(Stage::Encode),
            Self::Encoded => None,
        }
    }

    /// The stage that hangs if nothing moves while the channel holds items; `None`: the last stage.
    const fn hanging(self) -> Option<Stage> {
        match self {
            // A ticket is taken when its sample is decoded.
            Self::Decoded => Some(Stage::Decode),
            other => other.consumer(),
        }
    }

    /// Whether each open shard or each lane has a channel of this name, from which items are taken in turn.
    const fn is_taken_in_turn(self) -> bool {
        matches!(
            self,
            Self::Chunks | Self::Samples | Self::Decoded | Self::Batches
        )
    }
}

/// The channels of the decode threads.
pub(crate) const DECODE_CHANNELS: OrderedNames = OrderedNames {
    items: FlowChannel::Decode.name(),
    tickets: FlowChannel::Decoded.name(),
};

impl FlowMetrics {
    /// An empty registry of every [`Stage`].
    #[must_use]
    pub fn new() -> Self {
        Self::with_stages(
            &Stage::NAMES,
            EventCounter::recorded(SAMPLES_SKIPPED, "reason"),
        )
    }

    /// As [`FlowMetrics::new`], for a measurement: skipped samples are counted here and not in the
    /// process's metrics.
    #[must_use]
    pub fn private() -> Self {
        Self::with_stages(&Stage::NAMES, EventCounter::private())
    }

    /// The handle under which `stage` reports. Any number of threads may hold one.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> StageHandle {
        self.handle(stage as usize)
    }
}

impl Default for FlowMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl FlowSnapshot {
    /// The numbers of one stage.
    #[must_use]
    pub fn stage(&self, stage: Stage) -> &StageSnapshot {
        &self.stages[stage as usize]
    }

    /// Writes the stage clock, the fill of the channels and the count of cut captions to the current recorder of the
    /// [`metrics`](::metrics) facade. Skipped samples and S3 requests are recorded when they happen.
    pub fn export(&self) {
        for stage in &self.stages {
            let name = stage.stage;
            counter!(STAGE_ITEMS, "stage" => name).absolute(stage.items);
            counter!(STAGE_BYTES, "stage" => name).absolute(stage.bytes);
            gauge!(STAGE_BUSY, "stage" => name).set(stage.busy_seconds);
            gauge!(STAGE_STARVED, "stage" => name).set(stage.starved_seconds);
            gauge!(STAGE_BLOCKED, "stage" => name).set(stage.blocked_seconds);
        }
        for (name, channel) in &self.channels {
            gauge!(CHANNEL_ITEMS, "channel" => name.clone()).set(channel.items as f64);
            gauge!(CHANNEL_CAPACITY, "channel" => name.clone()).set(channel.capacity as f64);
        }
        counter!(CAPTIONS_TRUNCATED).absolute(self.truncated_captions);
    }

    /// The stage that limits the others: the one whose threads wait least. A stage that was active for
    /// less than a tenth of the time, such as fetching a few small shards, is left out. `None` before
    /// any stage ran.
    #[must_use]
    pub fn limiting_stage(&self) -> Option<Stage> {
        self.limiting_index().map(|index| Stage::ALL[index])
    }

    /// The stage that hangs when no batch or step comes any more: the one behind the last channel that
    /// still holds items, or fetch. `consumer` is the last stage of the run.
    #[must_use]
    pub fn hanging_stage(&self, consumer: Stage) -> Stage {
        let holds_items = |channel: &FlowChannel| {
            let fill = self.channels.get(channel.name());
            let fill = fill.copied().unwrap_or_default();
            // Shards and lanes are read several at once and taken in turn: while one hangs, the others are full.
            fill.items > 0 && !(channel.is_taken_in_turn() && fill.empty > 0)
        };
        let last = FlowChannel::ALL.into_iter().rev().find(holds_items);
        last.map_or(Stage::Fetch, |channel| {
            channel.hanging().unwrap_or(consumer)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::flow::channel;
    use metrics_util::MetricKind;
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    #[test]
    fn stage_names_are_the_metrics_labels() {
        let snapshot = FlowMetrics::new().snapshot();
        let names: Vec<_> = snapshot.stages.iter().map(|s| s.stage).collect();
        assert_eq!(
            names,
            [
                "fetch", "untar", "filter", "shuffle", "decode", "batch", "encode", "train",
                "write"
            ]
        );
        for stage in Stage::ALL {
            assert_eq!(Stage::ALL[stage as usize], stage);
            assert_eq!(serde_json::to_value(stage).unwrap(), stage.name());
        }
    }

    #[test]
    fn export_and_skips_reach_the_recorder_in_place() {
        let recorder = DebuggingRecorder::new();
        ::metrics::with_local_recorder(&recorder, || {
            let metrics = FlowMetrics::new();
            let fetch = metrics.stage(Stage::Fetch);
            fetch.add_items(3);
            fetch.add_busy(Duration::from_millis(1500));
            let (_sender, _receiver) = channel::<u8>(&metrics, FlowChannel::Batches.name(), 4);
            metrics.skip("no_image");
            metrics.skip("no_image");
            FlowMetrics::private().skip("no_image");
            metrics.add_truncated_captions(2);
            metrics.snapshot().export();
        });
        let values: Vec<_> = recorder.snapshotter().snapshot().into_vec();
        let value = |kind: MetricKind, name: &str, label: &str| {
            let found = values.iter().find(|(key, ..)| {
                let key_kind = key.kind();
                let key = key.key();
                let has_label = key.labels().any(|l| l.value() == label);
                key_kind == kind && key.name() == name && has_label
            });
            match &found.unwrap().3 {
                DebugValue::Counter(count) => *count as f64,
                DebugValue::Gauge(value) => value.into_inner(),
                DebugValue::Histogram(_) => panic!("{name} is a histogram"),
            }
        };
        assert_eq!(value(MetricKind::Counter, STAGE_ITEMS, "fetch"), 3.0);
        assert_eq!(value(MetricKind::Gauge, STAGE_BUSY, "fetch"), 1.5);
        assert_eq!(value(MetricKind::Gauge, CHANNEL_CAPACITY, "batches"), 4.0);
        assert_eq!(value(MetricKind::Counter, SAMPLES_SKIPPED, "no_image"), 2.0);
        let cut = values
            .iter()
            .find(|(key, ..)| key.key().name() == CAPTIONS_TRUNCATED);
        assert!(matches!(cut.unwrap().3, DebugValue::Counter(2)));
    }

    #[test]
    fn limit_counts_one_thread_beside_many() {
        let metrics = FlowMetrics::new();
        let seconds = Duration::from_secs;
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
    fn hanging_stage_is_behind_the_last_filled_channel() {
        let metrics = FlowMetrics::new();
        let stage = metrics.stage(Stage::Fetch);
        let hangs = || metrics.snapshot().hanging_stage(Stage::Write);
        assert_eq!(hangs(), Stage::Fetch);
        let open = |of: FlowChannel| channel::<u8>(&metrics, of.name(), 4);
        let (first, one) = open(FlowChannel::Samples);
        let (second, _two) = open(FlowChannel::Samples);
        first.send_blocking(1, &stage).unwrap();
        // The other shard's turn has come, and its channel is empty.
        assert_eq!(hangs(), Stage::Fetch);
        let (chunks, _bytes) = open(FlowChannel::Chunks);
        chunks.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Untar);
        second.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Shuffle);
        let (decoded, _last) = open(FlowChannel::Decoded);
        decoded.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Decode);
        let (batches, _third) = open(FlowChannel::Batches);
        batches.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Encode);
        let (encoded, _out) = open(FlowChannel::Encoded);
        encoded.send_blocking(1, &stage).unwrap();
        assert_eq!(hangs(), Stage::Write);
        drop(one);
    }
}
