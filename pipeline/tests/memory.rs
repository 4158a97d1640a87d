//! Memory stays flat however long the stream. Alone in its file, so that nothing else is measured.

mod support;

use coffey_pipeline::stages::Stage;
use coffey_pipeline::{ImageOptions, StreamConfig};
use support::{Bench, bucket, config};

const MIB: u64 = 1 << 20;

/// Memory held by this process, in bytes.
#[allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Reads `samples` samples of small shards, again and again; what was held after each twentieth.
#[allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]
fn curve(shards: u32, samples_each: u32, samples: u64) -> Vec<u64> {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), shards, |_| samples_each);
    let bench = Bench::embedded(root.path());
    let batch_size = 50;
    let stream = bench
        .open(StreamConfig {
            resample: true,
            shuffle_buffer: 1000,
            batch_size,
            image: ImageOptions {
                resolution: 8,
                ..ImageOptions::default()
            },
            ..config(shards)
        })
        .unwrap();
    let consumer = bench.metrics.stage(Stage::Train);
    let batches = samples / batch_size as u64;
    let mut curve = Vec::new();
    for n in 1..=batches {
        let batch = stream.batches().recv_blocking(&consumer).unwrap().unwrap();
        assert_eq!(batch.samples.len(), batch_size);
        if n % (batches / 20) == 0 {
            curve.push(resident());
        }
    }
    let text: Vec<_> = curve
        .iter()
        .map(|bytes| format!("{:.1}", *bytes as f64 / MIB as f64))
        .collect();
    println!(
        "{samples} samples, MiB held after each twentieth: {}",
        text.join(" ")
    );
    curve
}

/// What came after the first half, over the most in it. Until then the allocator's arenas fill up:
/// the curve climbs by some MiB and bends; a leak would go on in the second half.
fn growth(curve: &[u64]) -> u64 {
    let (first, rest) = curve.split_at(curve.len() / 2);
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    most(rest).saturating_sub(most(first))
}

#[test]
fn memory_stays_flat() {
    let curve = curve(6, 200, 60_000);
    assert!(growth(&curve) < 8 * MIB, "{curve:?}");
}

/// Minutes: `cargo nextest run --release -p coffey-pipeline --test memory --run-ignored only`.
#[test]
#[ignore = "takes minutes"]
fn memory_stays_flat_over_a_million_samples() {
    let curve = curve(20, 1000, 1_000_000);
    assert!(growth(&curve) < 8 * MIB, "{curve:?}");
    assert!(curve.iter().all(|held| *held < 200 * MIB), "{curve:?}");
}
