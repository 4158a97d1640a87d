//! The laws of order, against the embedded S3 server.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coffey_pipeline::{CropMode, Cursor, Filter, ImageOptions, Order, StreamConfig};
use support::{Bench, bucket, config, keys};

#[test]
fn threads_change_nothing_in_any_batch() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 5, |n| 6 + n);
    let bench = Bench::embedded(root.path());
    for order in [Order::Shuffled, Order::Sequential] {
        let run = |decode_threads, prefetch_batches| {
            let config = StreamConfig {
                decode_threads,
                prefetch_batches,
                order,
                ..config(shards.clone())
            };
            bench.batches(config, 20).unwrap()
        };
        let one = run(1, 1);
        assert!(one.len() >= 10);
        assert_eq!(one, run(2, 4));
        assert_eq!(one, run(5, 9));
    }
}

#[test]
fn resuming_after_any_batch_equals_never_having_stopped() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |n| 5 + n);
    // A broken image and a sample without caption are in the way.
    let mut members: Vec<_> = (0..6).flat_map(|n| support::sample(1, n)).collect();
    members[3].1.truncate(60);
    members[7].0 = "000010002.other".to_owned();
    std::fs::write(
        root.path().join("data/00001.tar"),
        support::tar_of(&members),
    )
    .unwrap();
    let bench = Bench::embedded(root.path());
    for (resample, order) in [
        (false, Order::Shuffled),
        (true, Order::Shuffled),
        (false, Order::Sequential),
    ] {
        let config = |resume: Option<Cursor>, decode_threads| StreamConfig {
            resume,
            resample,
            order,
            decode_threads,
            max_bad_fraction: 0.5,
            filter: Filter {
                min_size: Some(501),
                ..Filter::default()
            },
            ..config(shards.clone())
        };
        let whole = bench.batches(config(None, 2), 12).unwrap();
        for (n, batch) in whole.iter().enumerate().take(whole.len() - 1) {
            let json = serde_json::to_string(&batch.cursor).unwrap();
            let cursor = serde_json::from_str(&json).unwrap();
            let rest = bench
                .batches(config(Some(cursor), 1 + n % 3), whole.len() - n - 1)
                .unwrap();
            assert_eq!(
                rest,
                whole[n + 1..],
                "{order:?}, resampled: {resample}, from batch {n}"
            );
        }
    }
}

#[test]
fn ranks_share_every_epoch_without_overlap() {
    let root = tempfile::tempdir().unwrap();
    // As many samples in every shard, so that every rank's epochs are equally long.
    let shards = bucket(root.path(), 6, |_| 4);
    let bench = Bench::embedded(root.path());
    let every: BTreeSet<String> = (0..6)
        .flat_map(|s| (0..4).map(move |n| format!("{s:05}{n:04}")))
        .collect();
    for world in [1, 2, 3, 6] {
        let per_rank = 24 / world;
        let runs: Vec<Vec<String>> = (0..world)
            .map(|rank| {
                let config = StreamConfig {
                    rank,
                    world,
                    batch_size: 2,
                    ..config(shards.clone())
                };
                let batches = bench.batches(config, per_rank).unwrap();
                assert!(
                    batches
                        .iter()
                        .all(|batch| batch.samples.iter().all(|s| s.epoch < 2))
                );
                keys(&batches)
            })
            .collect();
        for epoch in 0..2 {
            let seen: Vec<String> = runs
                .iter()
                .flat_map(|run| run[epoch * per_rank..(epoch + 1) * per_rank].to_vec())
                .collect();
            assert_eq!(seen.len(), 24);
            assert_eq!(
                seen.into_iter().collect::<BTreeSet<_>>(),
                every,
                "world {world}, epoch {epoch}"
            );
        }
    }
}

#[test]
fn seeds_and_epochs_shuffle_differently() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 6);
    let bench = Bench::embedded(root.path());
    let run = |seed| {
        let config = StreamConfig {
            seed,
            ..config(shards.clone())
        };
        keys(&bench.batches(config, 12).unwrap())
    };
    let one = run(1);
    assert_eq!(one, run(1));
    assert_ne!(one, run(2));
    assert_ne!(one[..24], one[24..]);
    let mut sorted = one[..24].to_vec();
    sorted.sort_unstable();
    assert_ne!(one[..24], sorted);
}

#[test]
fn a_sequential_stream_reads_all_and_says_where_each_shard_ends() {
    let root = tempfile::tempdir().unwrap();
    let counts = [4, 0, 7, 1, 4];
    let shards = bucket(root.path(), 5, |n| counts[n as usize]);
    let bench = Bench::embedded(root.path());
    let batches = bench
        .all(StreamConfig {
            order: Order::Sequential,
            ..config(shards)
        })
        .unwrap();
    let mut sorted = keys(&batches);
    sorted.sort_unstable();
    assert_eq!(keys(&batches), sorted);
    let sizes: Vec<usize> = batches.iter().map(|batch| batch.samples.len()).collect();
    assert_eq!(sizes, [4, 4, 4, 4]);
    let ends: Vec<Vec<(usize, u64)>> = batches
        .iter()
        .map(|batch| {
            batch
                .finished_shards
                .iter()
                .map(|s| (s.shard, s.samples))
                .collect()
        })
        .collect();
    assert_eq!(
        ends,
        [
            vec![(0, 4), (1, 0)],
            vec![],
            vec![(2, 7), (3, 1)],
            vec![(4, 4)]
        ]
    );
    let positions: Vec<u64> = batches
        .iter()
        .flat_map(|b| b.samples.iter().map(|s| s.position))
        .collect();
    assert_eq!(positions, (0..16).collect::<Vec<_>>());
}

#[test]
fn a_sequential_stream_ends_with_what_is_left() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 3);
    let bench = Bench::embedded(root.path());
    let batches = bench
        .all(StreamConfig {
            order: Order::Sequential,
            ..config(shards)
        })
        .unwrap();
    assert_eq!(batches.len(), 2);
    assert_eq!(batches[1].samples.len(), 2);
    assert_eq!(batches[1].pixels.len(), 2 * 3 * 16 * 16);
    assert_eq!(batches[1].finished_shards.len(), 1);
}

#[test]
fn a_sample_keeps_its_crop_when_other_shards_leave_the_list() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 4);
    let bench = Bench::embedded(root.path());
    let run = |shards: &[coffey_pipeline::ShardUrl]| {
        let config = StreamConfig {
            order: Order::Sequential,
            ..config(shards.to_vec())
        };
        bench.all(config).unwrap()
    };
    assert_eq!(run(&shards)[2].pixels, run(&shards[2..])[0].pixels);
}

#[test]
fn max_samples_begins_the_next_epoch_early() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 6);
    let bench = Bench::embedded(root.path());
    let config = |order| StreamConfig {
        max_samples: Some(10),
        batch_size: 5,
        order,
        ..config(shards.clone())
    };
    let batches = bench.batches(config(Order::Shuffled), 6).unwrap();
    let epochs: Vec<u64> = batches
        .iter()
        .flat_map(|b| b.samples.iter().map(|s| s.epoch))
        .collect();
    let expected: Vec<u64> = (0..30).map(|n| n / 10).collect();
    assert_eq!(epochs, expected);
    assert_eq!(
        keys(&bench.all(config(Order::Sequential)).unwrap()).len(),
        10
    );
}

#[test]
fn batches_hold_what_the_options_say() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 5);
    let bench = Bench::embedded(root.path());
    let config = StreamConfig {
        order: Order::Sequential,
        image: ImageOptions {
            resolution: 16,
            crop: CropMode::Center,
            ..ImageOptions::default()
        },
        ..config(shards)
    };
    let batch = &bench.batches(config, 1).unwrap()[0];
    let sample = &batch.samples[3];
    assert_eq!(&*sample.key, "000000003");
    assert_eq!(sample.caption, "picture 3");
    assert_eq!(sample.original, (23, 24));
    assert_eq!(sample.resized, (16, 16));
    assert_eq!((sample.crop, sample.flipped), ((0, 0), false));
    assert_eq!(sample.json.as_ref().unwrap()["original_width"], 503);
    // 20x24 becomes 16x19, cut in the middle: Python's round(1.5) is 2.
    assert_eq!(
        (batch.samples[0].resized, batch.samples[0].crop),
        ((16, 19), (2, 0))
    );
    assert_eq!(batch.pixels.len(), 4 * 3 * 16 * 16);
    assert!(
        batch
            .pixels
            .iter()
            .all(|value| (-1.0..=1.0).contains(value))
    );
}

#[test]
fn a_cursor_of_another_stream_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 4);
    let bench = Bench::embedded(root.path());
    let cursor = bench.batches(config(shards.clone()), 1).unwrap()[0]
        .cursor
        .clone();
    let resumed = |change: &dyn Fn(&mut StreamConfig)| {
        let mut config = config(shards.clone());
        config.resume = Some(cursor.clone());
        change(&mut config);
        bench.open(config).err().map(|error| {
            assert!(error.is_config());
            error.to_string()
        })
    };
    assert_eq!(resumed(&|_| {}), None);
    assert_eq!(resumed(&|config| config.batch_size = 1), None);
    assert!(
        resumed(&|config| config.seed = 1)
            .unwrap()
            .contains("seed = 453645634")
    );
    assert!(
        resumed(&|config| config.world = 2)
            .unwrap()
            .contains("world")
    );
    assert!(
        resumed(&|config| drop(config.shards.pop()))
            .unwrap()
            .contains("shards")
    );
    assert!(
        resumed(&|config| config.filter.min_size = Some(1))
            .unwrap()
            .contains("filter")
    );
}

#[test]
fn dropping_a_stream_ends_it_promptly() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 30);
    let bench = Bench::embedded(root.path());
    for taken in [0, 1, 5] {
        let stream = bench.open(config(shards.clone())).unwrap();
        support::take(&stream, &bench.metrics, taken).unwrap();
        let start = Instant::now();
        drop(stream);
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    let snapshot = bench.metrics.snapshot();
    assert!(!snapshot.channels.contains_key("batches"), "{snapshot:?}");
}

#[test]
fn stages_report_what_they_did() {
    use coffey_pipeline::flow::Stage;
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 6);
    let bench = Bench::embedded(root.path());
    bench
        .all(StreamConfig {
            order: Order::Sequential,
            ..config(shards)
        })
        .unwrap();
    let snapshot = bench.metrics.snapshot();
    let items = |stage| snapshot.stage(stage).items;
    assert_eq!(items(Stage::Untar), 12);
    assert_eq!(items(Stage::Filter), 12);
    assert_eq!(items(Stage::Shuffle), 12);
    assert_eq!(items(Stage::Decode), 12);
    assert_eq!(items(Stage::Batch), 3);
    assert!(snapshot.stage(Stage::Fetch).bytes > 0);
    assert!(snapshot.stage(Stage::Decode).bytes > 0);
    assert!(snapshot.limiting_stage().is_some());
    assert_eq!(snapshot.s3_requests["ok"], 2);
}
