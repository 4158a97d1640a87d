//! The memory of a long stream.

use crate::child::is_alone;
use crate::support::{Bench, bucket, config};
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{ImageOptions, StreamConfig};

const MIB: u64 = 1 << 20;

/// The resident memory of this process, in bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Reads `samples` samples of small shards in a loop; returns the resident memory after each twentieth of them.
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

/// The greatest value of the second half less the greatest of the first half.
///
/// In the first half the allocator's arenas fill up: the curve climbs by some MiB and levels off. A leak goes on in the second half.
fn growth(curve: &[u64]) -> u64 {
    let (first, rest) = curve.split_at(curve.len() / 2);
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    most(rest).saturating_sub(most(first))
}

#[test]
fn stream_memory_stays_flat() {
    if !is_alone("memory::stream_memory_stays_flat") {
        return;
    }
    let curve = curve(6, 200, 60_000);
    assert!(growth(&curve) < 8 * MIB, "{curve:?}");
}

mod slow {
    use super::*;

    #[test]
    #[ignore = "takes minutes"]
    fn stream_memory_stays_flat_over_a_million_samples() {
        if !is_alone("memory::slow::stream_memory_stays_flat_over_a_million_samples") {
            return;
        }
        let curve = curve(20, 1000, 1_000_000);
        assert!(growth(&curve) < 8 * MIB, "{curve:?}");
        assert!(curve.iter().all(|held| *held < 200 * MIB), "{curve:?}");
    }
}
