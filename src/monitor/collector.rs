//! The names Prometheus knows, and the values behind them when it asks.

use std::collections::BTreeMap;
use std::fmt;

use coffey_pipeline::flow::{ChannelSnapshot, StageSnapshot};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, NoLabelSet,
};
use prometheus_client::metrics::MetricType;

use super::Monitor;

impl Collector for Monitor {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let flow = self.flow().snapshot();
        let mut metrics = Metrics(encoder);

        // A counter's `_total` is appended by the encoder.
        let stages = |read: fn(&StageSnapshot) -> f64| {
            flow.stages
                .iter()
                .map(move |stage| (stage.stage.name(), read(stage)))
        };
        metrics.counters(
            ("coffey_stage_items", "Items a stage finished"),
            "stage",
            flow.stages.iter().map(|s| (s.stage.name(), s.items)),
        )?;
        metrics.counters(
            ("coffey_stage_bytes", "Bytes that passed a stage"),
            "stage",
            flow.stages.iter().map(|s| (s.stage.name(), s.bytes)),
        )?;
        metrics.counters(
            (
                "coffey_stage_busy_seconds",
                "Time a stage worked, summed over its threads",
            ),
            "stage",
            stages(|s| s.busy_seconds),
        )?;
        metrics.counters(
            (
                "coffey_stage_starved_seconds",
                "Time a stage waited for input, summed over its threads",
            ),
            "stage",
            stages(|s| s.starved_seconds),
        )?;
        metrics.counters(
            (
                "coffey_stage_blocked_seconds",
                "Time a stage waited for room in its output, summed over its threads",
            ),
            "stage",
            stages(|s| s.blocked_seconds),
        )?;

        let channels = |read: fn(&ChannelSnapshot) -> u64| {
            flow.channels
                .iter()
                .map(move |(name, channel)| (name.as_str(), read(channel)))
        };
        metrics.gauges(
            ("coffey_channel_items", "Items waiting in a channel"),
            "channel",
            channels(|c| c.items),
        )?;
        metrics.gauges(
            ("coffey_channel_capacity", "Most items a channel holds"),
            "channel",
            channels(|c| c.capacity),
        )?;

        metrics.counters(
            ("coffey_samples_skipped", "Samples left out, by reason"),
            "reason",
            counts(&flow.skipped),
        )?;
        metrics.counters(
            ("coffey_s3_requests", "Requests to S3, by outcome"),
            "outcome",
            counts(&flow.s3_requests),
        )?;
        metrics.counters(
            ("coffey_s3_retries", "Repeated requests to S3, by reason"),
            "reason",
            counts(&flow.s3_retries),
        )?;

        let stalled = u64::from(self.stalled().is_some());
        metrics.gauge(
            (
                "coffey_stalled",
                "1 while no batch or step has come for train.stall_timeout, as /healthz",
            ),
            stalled,
        )?;

        let (step, checkpoint) = {
            let seen = self.seen();
            (seen.step, seen.checkpoint)
        };
        if let Some(step) = step {
            metrics.gauge(("coffey_train_step", "Steps made"), step.step)?;
            metrics.gauge(("coffey_train_loss", "Loss of the newest step"), step.loss)?;
            metrics.gauge(
                (
                    "coffey_train_grad_norm",
                    "Gradient norm of the newest step, before clipping",
                ),
                step.grad_norm,
            )?;
            metrics.gauge(
                ("coffey_train_lr", "Learning rate of the newest step"),
                step.lr,
            )?;
            metrics.counter(("coffey_train_samples", "Samples trained on"), step.samples)?;
        }
        if let Some(checkpoint) = checkpoint {
            metrics.gauge(
                (
                    "coffey_checkpoint_seconds",
                    "Time the newest checkpoint took to save",
                ),
                checkpoint.took.as_secs_f64(),
            )?;
        }
        Ok(())
    }
}

fn counts(counts: &BTreeMap<String, u64>) -> impl Iterator<Item = (&str, u64)> {
    counts.iter().map(|(name, count)| (name.as_str(), *count))
}

struct Metrics<'a>(DescriptorEncoder<'a>);

/// A metric's name and its help text.
type Named = (&'static str, &'static str);

impl Metrics<'_> {
    fn counter(&mut self, (name, help): Named, value: impl EncodeCounterValue) -> fmt::Result {
        self.0
            .encode_descriptor(name, help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn gauge(&mut self, (name, help): Named, value: impl EncodeGaugeValue) -> fmt::Result {
        self.0
            .encode_descriptor(name, help, None, MetricType::Gauge)?
            .encode_gauge(&value)
    }

    fn counters<'n, V: EncodeCounterValue>(
        &mut self,
        (name, help): Named,
        label: &str,
        values: impl Iterator<Item = (&'n str, V)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Counter)?;
        for (key, value) in values {
            metric
                .encode_family(&[(label, key)])?
                .encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    fn gauges<'n, V: EncodeGaugeValue>(
        &mut self,
        (name, help): Named,
        label: &str,
        values: impl Iterator<Item = (&'n str, V)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (key, value) in values {
            metric
                .encode_family(&[(label, key)])?
                .encode_gauge(&value)?;
        }
        Ok(())
    }
}
