//! The laws of order, against the embedded S3 server.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use coffey_pipeline::{
    CropMode, Cursor, Filter, ImageOptions, Order, ShardUrl, StreamConfig, StreamError,
};
use support::{Bench, bucket, config, keys, pixels};

/// Shards in which a broken image and a sample without a caption are in the way.
#[allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]
fn with_faults(root: &std::path::Path, count: u32) -> Vec<ShardUrl> {
    let shards = bucket(root, count, |n| 5 + n % 4);
    let mut members: Vec<_> = (0..6).flat_map(|n| support::sample(1, n)).collect();
    members[3].1.truncate(60);
    members[7].0 = "000010002.other".to_owned();
    std::fs::write(root.join("data/00001.tar"), support::tar_of(&members)).unwrap();
    shards
}

/// Every way a stream can be set up that the order depends on, and then some.
fn settings(shards: &[ShardUrl]) -> Vec<StreamConfig> {
    let mut all = Vec::new();
    for (resample, order) in [
        (false, Order::Shuffled),
        (true, Order::Shuffled),
        (false, Order::Sequential),
    ] {
        for (open_shards, shuffle_buffer, batch_size, max_samples, rank, world) in [
            (3, 7, 4, None, 0, 1),
            (1, 0, 1, None, 0, 1),
            (2, 40, 3, Some(11), 1, 2),
            (5, 3, 5, Some(6), 0, 1),
            (9, 12, 2, None, 2, 3),
        ] {
            all.push(StreamConfig {
                resample,
                order,
                open_shards,
                shuffle_buffer,
                batch_size,
                max_samples,
                rank,
                world,
                max_bad_fraction: 0.5,
                filter: Filter {
                    min_size: Some(501),
                    ..Filter::default()
                },
                ..config(shards.to_vec())
            });
        }
    }
    all
}

#[test]
fn threads_change_nothing_in_any_batch() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_faults(root.path(), 7);
    let bench = Bench::embedded(root.path());
    for settings in settings(&shards) {
        let run = |decode_threads, prefetch_batches| {
            let config = StreamConfig {
                decode_threads,
                prefetch_batches,
                ..settings.clone()
            };
            bench.batches(config, 12).unwrap()
        };
        let one = run(1, 1);
        assert!(!one.is_empty(), "{settings:?}");
        assert_eq!(one, run(2, 4), "{settings:?}");
        assert_eq!(one, run(5, 9), "{settings:?}");
    }
}

#[test]
fn resuming_after_any_batch_equals_never_having_stopped() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_faults(root.path(), 7);
    let bench = Bench::embedded(root.path());
    for settings in settings(&shards) {
        let config = |resume: Option<Cursor>, decode_threads| StreamConfig {
            resume,
            decode_threads,
            ..settings.clone()
        };
        let whole = bench.batches(config(None, 2), 9).unwrap();
        for (n, batch) in whole.iter().enumerate().take(whole.len() - 1) {
            let json = serde_json::to_string(&batch.cursor).unwrap();
            let cursor = serde_json::from_str(&json).unwrap();
            let rest = bench
                .batches(config(Some(cursor), 1 + n % 3), whole.len() - n - 1)
                .unwrap();
            assert_eq!(rest, whole[n + 1..], "{settings:?}, from batch {n}");
        }
    }
}

#[test]
fn large_images_are_shuffled_from_fewer_and_resume_as_well() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 6);
    // Noise does not compress: about 0.4 MB an image.
    let mut generator = fastrand::Rng::with_seed(1);
    let noise = image::RgbImage::from_fn(370, 370, |_, _| {
        image::Rgb([generator.u8(..), generator.u8(..), generator.u8(..)])
    });
    let mut png = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut png, image::ImageFormat::Png).unwrap();
    for shard in 0..4 {
        let mut members: Vec<_> = (0..6).flat_map(|n| support::sample(shard, n)).collect();
        members[3].1.clone_from(png.get_ref());
        members[12].1.clone_from(png.get_ref());
        let path = root.path().join(format!("data/{shard:05}.tar"));
        std::fs::write(path, support::tar_of(&members)).unwrap();
    }
    let bench = Bench::embedded(root.path());
    let run = |shuffle_buffer_mb, resume| {
        let config = StreamConfig {
            shuffle_buffer: 40,
            shuffle_buffer_mb,
            batch_size: 1,
            resume,
            ..config(shards.clone())
        };
        bench.batches(config, 30).unwrap()
    };
    let bounded = run(1, None);
    assert_ne!(keys(&bounded), keys(&run(100, None)));
    for n in 0..29 {
        let rest = run(1, Some(bounded[n].cursor.clone()));
        assert_eq!(rest[..29 - n], bounded[n + 1..], "from batch {n}");
    }
}

#[test]
fn resuming_reads_no_shard_that_is_through() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 60, |_| 4);
    let config = |resume| StreamConfig {
        open_shards: 2,
        shuffle_buffer: 4,
        resume,
        ..config(shards.clone())
    };
    let cursor = {
        let bench = Bench::embedded(root.path());
        bench.batches(config(None), 50).unwrap().remove(49).cursor
    };
    let bench = Bench::embedded(root.path());
    bench.batches(config(Some(cursor)), 1).unwrap();
    // Two in turn, the one after them, and what four buffered samples can belong to; then what one
    // batch and the bounded channels behind it read on.
    let requests: u64 = bench.sources.s3_server().counts().requests.values().sum();
    assert!(requests < 25, "{requests}");
}

#[test]
fn a_shard_that_changed_since_is_named() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 6);
    let bench = Bench::embedded(root.path());
    let batch = bench.batches(config(shards.clone()), 2).unwrap().remove(1);
    for shard in 0..3 {
        let path = root.path().join(format!("data/{shard:05}.tar"));
        std::fs::write(path, support::shard(shard, 1)).unwrap();
    }
    let error = bench.error(StreamConfig {
        resume: Some(batch.cursor),
        ..config(shards)
    });
    assert!(
        matches!(error, StreamError::ShardChanged { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains(".tar: its sample "), "{error}");
}

#[test]
fn what_is_left_out_stands_with_the_batches_in_order() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_faults(root.path(), 3);
    let bench = Bench::embedded(root.path());
    let batches = bench
        .all(StreamConfig {
            order: Order::Sequential,
            max_bad_fraction: 0.5,
            ..config(shards)
        })
        .unwrap();
    let skipped: Vec<_> = batches
        .iter()
        .flat_map(|batch| &batch.skipped)
        .map(|s| (s.shard, &*s.key, s.reason.as_str()))
        .collect();
    assert_eq!(
        skipped,
        [
            (1, "000010001", "decode_error"),
            (1, "000010002", "no_caption")
        ]
    );
}

#[test]
fn every_rank_has_a_batch_for_every_step() {
    let root = tempfile::tempdir().unwrap();
    // Shards of very different length.
    let shards = bucket(root.path(), 5, |n| 1 + 9 * (n % 2));
    let bench = Bench::embedded(root.path());
    for rank in 0..3 {
        let config = StreamConfig {
            rank,
            world: 3,
            ..config(shards.clone())
        };
        let batches = bench.batches(config, 9).unwrap();
        assert_eq!(batches.len(), 9);
        assert!(batches.iter().all(|batch| batch.samples.len() == 4));
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
    assert_eq!(pixels(&batches[1]).len(), 2 * 3 * 16 * 16);
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
    assert_eq!(pixels(&run(&shards)[2]), pixels(&run(&shards[2..])[0]));
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
    let cut_at = |top, left| coffey_pipeline::image::CropWindow {
        top,
        left,
        flipped: false,
    };
    let sample = &batch.samples[3];
    assert_eq!(&*sample.key, "000000003");
    assert_eq!(sample.caption, "picture 3");
    assert_eq!(sample.original, (23, 24));
    assert_eq!(sample.resized, (16, 16));
    assert_eq!(sample.crops, [cut_at(0, 0)]);
    assert_eq!(sample.json.as_ref().unwrap()["original_width"], 503);
    // 20x24 becomes 16x19, cut in the middle: Python's round(1.5) is 2.
    assert_eq!(batch.samples[0].resized, (16, 19));
    assert_eq!(batch.samples[0].crops, [cut_at(2, 0)]);
    assert_eq!(pixels(batch).len(), 4 * 3 * 16 * 16);
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
    use coffey_pipeline::stages::Stage;
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
    assert_eq!(bench.sources.s3_server().counts().requests["ok"], 2);
}
