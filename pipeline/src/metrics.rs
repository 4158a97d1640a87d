//! Every metric of the pipeline and of the trainer: name, unit and help, in one place.
//!
//! Counters and gauges go through the [`metrics`](::metrics) facade, so the process that embeds this
//! crate chooses the recorder; without one they cost next to nothing. Two kinds of numbers are also
//! read back by the program and therefore have a store of their own:
//! - events that a command reports (skipped samples, S3 requests) are counted by an [`EventCounter`];
//! - the stage clock is read every second, and [`FlowSnapshot::export`](crate::flow::FlowSnapshot::export)
//!   writes it to the recorder when a value is asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use ::metrics::{Unit, counter, describe_counter, describe_gauge};

/// Items a stage finished.
pub const STAGE_ITEMS: &str = "coffey_stage_items_total";
/// Bytes that passed a stage.
pub const STAGE_BYTES: &str = "coffey_stage_bytes_total";
/// Seconds a stage worked.
pub const STAGE_BUSY: &str = "coffey_stage_busy_seconds_total";
/// Seconds a stage waited for input.
pub const STAGE_STARVED: &str = "coffey_stage_starved_seconds_total";
/// Seconds a stage waited for room in its output.
pub const STAGE_BLOCKED: &str = "coffey_stage_blocked_seconds_total";
/// Items waiting in a channel.
pub const CHANNEL_ITEMS: &str = "coffey_channel_items";
/// Capacity of a channel.
pub const CHANNEL_CAPACITY: &str = "coffey_channel_capacity";
/// Samples left out.
pub const SAMPLES_SKIPPED: &str = "coffey_samples_skipped_total";
/// Captions that were cut to the length that the text encoder takes.
pub const CAPTIONS_TRUNCATED: &str = "coffey_captions_truncated_total";
/// Requests to S3.
pub const S3_REQUESTS: &str = "coffey_s3_requests_total";
/// Repeated requests to S3.
pub const S3_RETRIES: &str = "coffey_s3_retries_total";
/// Shards read from the cache.
pub const CACHE_HITS: &str = "coffey_cache_hits_total";
/// Shards that the cache did not have.
pub const CACHE_MISSES: &str = "coffey_cache_misses_total";
/// Whether the run is stalled.
pub const STALLED: &str = "coffey_stalled";
/// Training steps made.
pub const TRAIN_STEP: &str = "coffey_train_step";
/// Loss of the newest step.
pub const TRAIN_LOSS: &str = "coffey_train_loss";
/// Gradient norm of the newest step.
pub const TRAIN_GRAD_NORM: &str = "coffey_train_grad_norm";
/// Learning rate of the newest step.
pub const TRAIN_LR: &str = "coffey_train_lr";
/// Samples trained on.
pub const TRAIN_SAMPLES: &str = "coffey_train_samples_total";
/// Duration of the newest checkpoint.
pub const CHECKPOINT_SECONDS: &str = "coffey_checkpoint_seconds";
/// Number of ranks.
pub const RANKS: &str = "coffey_ranks";
/// The rank that took longest for its part of the newest step.
pub const SLOWEST_RANK: &str = "coffey_slowest_rank";
/// Time that the slowest rank took.
pub const SLOWEST_RANK_SECONDS: &str = "coffey_slowest_rank_seconds";
/// Time that the fastest rank took.
pub const FASTEST_RANK_SECONDS: &str = "coffey_fastest_rank_seconds";
/// Time in which the ranks exchanged gradients and weights.
pub const EXCHANGE_SECONDS: &str = "coffey_exchange_seconds";

/// Name, unit and help of each counter.
const COUNTERS: [(&str, Unit, &str); 9] = [
    (STAGE_ITEMS, Unit::Count, "Items a stage finished"),
    (STAGE_BYTES, Unit::Bytes, "Bytes that passed a stage"),
    (SAMPLES_SKIPPED, Unit::Count, "Samples left out, by reason"),
    (
        CAPTIONS_TRUNCATED,
        Unit::Count,
        "Captions cut to the length that the text encoder takes",
    ),
    (S3_REQUESTS, Unit::Count, "Requests to S3, by outcome"),
    (
        S3_RETRIES,
        Unit::Count,
        "Repeated requests to S3, by reason",
    ),
    (CACHE_HITS, Unit::Count, "Shards read from the cache"),
    (
        CACHE_MISSES,
        Unit::Count,
        "Shards that the cache did not have",
    ),
    (TRAIN_SAMPLES, Unit::Count, "Samples trained on"),
];

/// Name, unit and help of each gauge. A counter of the facade is an integer, so the sums of seconds are
/// gauges that never fall.
const GAUGES: [(&str, Unit, &str); 16] = [
    (
        STAGE_BUSY,
        Unit::Seconds,
        "Time a stage worked, summed over its threads",
    ),
    (
        STAGE_STARVED,
        Unit::Seconds,
        "Time a stage waited for input, summed over its threads",
    ),
    (
        STAGE_BLOCKED,
        Unit::Seconds,
        "Time a stage waited for room in its output, summed over its threads",
    ),
    (CHANNEL_ITEMS, Unit::Count, "Items waiting in a channel"),
    (CHANNEL_CAPACITY, Unit::Count, "Most items a channel holds"),
    (
        STALLED,
        Unit::Count,
        "1 while no batch or step has come for train.stall_timeout, as /healthz",
    ),
    (TRAIN_STEP, Unit::Count, "Steps made"),
    (TRAIN_LOSS, Unit::Count, "Loss of the newest step"),
    (
        TRAIN_GRAD_NORM,
        Unit::Count,
        "Gradient norm of the newest step, before clipping",
    ),
    (TRAIN_LR, Unit::Count, "Learning rate of the newest step"),
    (RANKS, Unit::Count, "Ranks of the run"),
    (
        SLOWEST_RANK,
        Unit::Count,
        "The rank that took longest for its part of the newest step",
    ),
    (
        SLOWEST_RANK_SECONDS,
        Unit::Seconds,
        "Time that the slowest rank took for its part of the newest step",
    ),
    (
        FASTEST_RANK_SECONDS,
        Unit::Seconds,
        "Time that the fastest rank took for its part of the newest step",
    ),
    (
        EXCHANGE_SECONDS,
        Unit::Seconds,
        "Time in which the ranks exchanged gradients and weights of the newest step",
    ),
    (
        CHECKPOINT_SECONDS,
        Unit::Seconds,
        "Time the newest checkpoint took to save",
    ),
];

/// Gives the current recorder the unit and the help of every metric.
pub fn describe() {
    for (name, unit, help) in COUNTERS {
        describe_counter!(name, unit, help);
    }
    for (name, unit, help) in GAUGES {
        describe_gauge!(name, unit, help);
    }
}

/// Counts events by the value of one label: in the recorder, and in a map that the program reads back.
#[derive(Debug)]
pub struct EventCounter {
    /// The metric and its label; `None`: the recorder sees nothing.
    metric: Option<(&'static str, &'static str)>,
    counts: Mutex<BTreeMap<Cow<'static, str>, u64>>,
}

impl EventCounter {
    /// Counts in the metric `name` under the label `label` as well.
    pub(crate) const fn recorded(name: &'static str, label: &'static str) -> Self {
        Self {
            metric: Some((name, label)),
            counts: Mutex::new(BTreeMap::new()),
        }
    }

    /// Counts for the program alone.
    pub(crate) const fn private() -> Self {
        Self {
            metric: None,
            counts: Mutex::new(BTreeMap::new()),
        }
    }

    /// Counts one event.
    pub(crate) fn add(&self, value: impl Into<Cow<'static, str>>) {
        let value = value.into();
        if let Some((name, label)) = self.metric {
            counter!(name, label => value.clone()).increment(1);
        }
        // A panic in another thread leaves whole numbers behind.
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(value).or_default() += 1;
    }

    /// Events so far, by the label's value.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<String, u64> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts
            .iter()
            .map(|(value, count)| (value.to_string(), *count))
            .collect()
    }
}
