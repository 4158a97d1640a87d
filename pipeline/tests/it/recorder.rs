//! A program that embeds the pipeline installs a metrics recorder of its own.

use std::collections::BTreeMap;

use coffey_pipeline::metrics::{S3_REQUESTS, SAMPLES_SKIPPED, STAGE_BUSY, STAGE_ITEMS, describe};
use coffey_pipeline::{Order, StreamConfig};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};

use crate::child::is_alone;
use crate::support::{Bench, config, sample, tar_of, urls};

/// Events come from several threads, so the recorder is global, and the process has no other test.
#[test]
fn embedding_recorder_receives_every_metric() {
    if !is_alone("recorder::embedding_recorder_receives_every_metric") {
        return;
    }
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    describe();

    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("data")).unwrap();
    let broken = vec![("without-image.txt".to_owned(), b"caption".to_vec())];
    let members: Vec<_> = (0..4).flat_map(|n| sample(7, n)).chain(broken).collect();
    std::fs::write(root.path().join("data/0.tar"), tar_of(&members)).unwrap();
    let bench = Bench::embedded(root.path());
    bench
        .all(StreamConfig {
            order: Order::Sequential,
            max_bad_fraction: 1.0,
            ..config(urls("s3://data/0.tar"))
        })
        .unwrap();
    bench.metrics.snapshot().export();

    let mut values = BTreeMap::new();
    for (key, _, help, value) in snapshotter.snapshot().into_vec() {
        let key = key.key();
        assert!(help.is_some(), "{} is not described", key.name());
        let label = key.labels().next().map(|label| label.value().to_owned());
        let value = match value {
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            DebugValue::Histogram(_) => panic!("{} is a histogram", key.name()),
        };
        values.insert((key.name().to_owned(), label.unwrap_or_default()), value);
    }
    let value = |name: &str, label: &str| values[&(name.to_owned(), label.to_owned())];
    let requests = bench.sources.s3_server().counts().requests["ok"];
    assert!(requests > 0);
    assert_eq!(value(S3_REQUESTS, "ok"), requests as f64);
    assert_eq!(value(SAMPLES_SKIPPED, "no_image"), 1.0);
    assert_eq!(value(STAGE_ITEMS, "decode"), 4.0);
    assert!(value(STAGE_BUSY, "decode") > 0.0);
}
