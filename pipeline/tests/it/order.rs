//! The laws of sample order, read from the embedded S3 server.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::support::{
    Bench, bucket, config, keys, pixels, sample, sequential, shard, take, tar_of,
};
use coffey_pipeline::image::CropWindow;
use coffey_pipeline::stages::Stage;
use coffey_pipeline::{
    Batch, BatchData, CropMode, Cursor, Filter, ImageOptions, Lanes, Order, SampleMeta, ShardUrl,
    SkippedSample, StreamConfig, StreamError,
};

/// Shards with a broken image and a sample without a caption.
fn with_faults(root: &std::path::Path, count: u32) -> Vec<ShardUrl> {
    let shards = bucket(root, count, |n| 5 + n % 4);
    let mut members: Vec<_> = (0..6).flat_map(|n| sample(1, n)).collect();
    members[3].1.truncate(60);
    members[7].0 = "000010002.other".to_owned();
    std::fs::write(root.join("data/00001.tar"), tar_of(&members)).unwrap();
    shards
}

/// Configurations that differ in every setting the order depends on.
fn settings(shards: &[ShardUrl]) -> Vec<StreamConfig> {
    let mut all = Vec::new();
    for (resample, order) in [
        (false, Order::Shuffled),
        (true, Order::Shuffled),
        (false, Order::Sequential),
    ] {
        for (open_shards, shuffle_buffer, batch_size, max_samples, lanes) in [
            (3, 7, 4, None, Lanes::default()),
            (1, 0, 1, None, Lanes::default()),
            (2, 40, 3, Some(11), Lanes::one(1, 2)),
            (5, 3, 5, Some(6), Lanes::default()),
            (9, 12, 2, None, Lanes::one(2, 3)),
            (4, 9, 2, None, Lanes::all(2, 1)),
            (1, 20, 1, Some(9), Lanes::all(4, 2)),
            (
                6,
                12,
                3,
                None,
                Lanes {
                    count: 4,
                    hosted: 2..4,
                    batches_in_turn: 3,
                },
            ),
        ] {
            if order == Order::Sequential && lanes.hosted.len() > 1 {
                continue;
            }
            all.push(StreamConfig {
                resample,
                order,
                open_shards,
                shuffle_buffer,
                batch_size,
                max_samples,
                lanes,
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
fn batches_do_not_depend_on_threads() {
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
fn image_stream_resumes_after_any_batch() {
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
fn shuffle_buffer_is_bounded_in_bytes_and_resumes() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 6);
    // Noise does not compress: an image takes about 0.4 MB.
    let mut generator = fastrand::Rng::with_seed(1);
    let noise = image::RgbImage::from_fn(370, 370, |_, _| {
        image::Rgb([generator.u8(..), generator.u8(..), generator.u8(..)])
    });
    let mut png = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut png, image::ImageFormat::Png).unwrap();
    for shard in 0..4 {
        let mut members: Vec<_> = (0..6).flat_map(|n| sample(shard, n)).collect();
        members[3].1.clone_from(png.get_ref());
        members[12].1.clone_from(png.get_ref());
        let path = root.path().join(format!("data/{shard:05}.tar"));
        std::fs::write(path, tar_of(&members)).unwrap();
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
fn resume_reads_no_finished_shard() {
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
    // Two open shards, the next one, those of the four buffered samples, and those that one batch and the bounded
    // channels read ahead.
    let requests: u64 = bench.sources.s3_server().counts().requests.values().sum();
    assert!(requests < 25, "{requests}");
}

#[test]
fn resume_names_changed_shard() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 6);
    let bench = Bench::embedded(root.path());
    let batch = bench.batches(config(shards.clone()), 2).unwrap().remove(1);
    for n in 0..3 {
        let path = root.path().join(format!("data/{n:05}.tar"));
        std::fs::write(path, shard(n, 1)).unwrap();
    }
    let error = bench.error(StreamConfig {
        resume: Some(batch.cursor),
        ..config(shards)
    });
    assert!(
        matches!(error, StreamError::ShardChanged { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("needs its sample "), "{error}");
}

#[test]
fn skipped_samples_come_in_batch_order() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_faults(root.path(), 3);
    let bench = Bench::embedded(root.path());
    let batches = bench
        .all(StreamConfig {
            max_bad_fraction: 0.5,
            ..sequential(shards)
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
fn lanes_have_a_batch_for_every_step() {
    let root = tempfile::tempdir().unwrap();
    // Shards of very different lengths.
    let shards = bucket(root.path(), 5, |n| 1 + 9 * (n % 2));
    let bench = Bench::embedded(root.path());
    for lane in 0..3 {
        let config = StreamConfig {
            lanes: Lanes::one(lane, 3),
            ..config(shards.clone())
        };
        let batches = bench.batches(config, 9).unwrap();
        assert_eq!(batches.len(), 9);
        assert!(batches.iter().all(|batch| batch.samples.len() == 4));
    }
}

#[test]
fn lanes_share_every_epoch_without_overlap() {
    let root = tempfile::tempdir().unwrap();
    // Every shard has as many samples, so that the epochs of all lanes are equally long.
    let shards = bucket(root.path(), 6, |_| 4);
    let bench = Bench::embedded(root.path());
    let every: BTreeSet<String> = (0..6)
        .flat_map(|s| (0..4).map(move |n| format!("{s:05}{n:04}")))
        .collect();
    for count in [1, 2, 3, 6] {
        let per_lane = 24 / count;
        let runs: Vec<Vec<String>> = (0..count)
            .map(|lane| {
                let config = StreamConfig {
                    lanes: Lanes::one(lane, count),
                    batch_size: 2,
                    ..config(shards.clone())
                };
                let batches = bench.batches(config, per_lane).unwrap();
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
                .flat_map(|run| run[epoch * per_lane..(epoch + 1) * per_lane].to_vec())
                .collect();
            assert_eq!(seen.len(), 24);
            assert_eq!(
                seen.into_iter().collect::<BTreeSet<_>>(),
                every,
                "{count} lanes, epoch {epoch}"
            );
        }
    }
}

#[test]
fn shuffle_differs_by_seed_and_epoch() {
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
fn sequential_stream_reports_shard_ends() {
    let root = tempfile::tempdir().unwrap();
    let counts = [4, 0, 7, 1, 4];
    let shards = bucket(root.path(), 5, |n| counts[n as usize]);
    let bench = Bench::embedded(root.path());
    let batches = bench.all(sequential(shards)).unwrap();
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
fn sequential_stream_ends_with_partial_batch() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 3);
    let bench = Bench::embedded(root.path());
    let batches = bench.all(sequential(shards)).unwrap();
    assert_eq!(batches.len(), 2);
    assert_eq!(batches[1].samples.len(), 2);
    assert_eq!(pixels(&batches[1]).len(), 2 * 3 * 16 * 16);
    assert_eq!(batches[1].finished_shards.len(), 1);
}

#[test]
fn crop_does_not_depend_on_other_shards() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 4);
    let bench = Bench::embedded(root.path());
    let run = |shards: &[ShardUrl]| bench.all(sequential(shards.to_vec())).unwrap();
    assert_eq!(pixels(&run(&shards)[2]), pixels(&run(&shards[2..])[0]));
}

#[test]
fn max_samples_ends_epoch_early() {
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
fn batch_follows_image_options() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 5);
    let bench = Bench::embedded(root.path());
    let config = StreamConfig {
        image: ImageOptions {
            resolution: 16,
            crop: CropMode::Center,
            ..ImageOptions::default()
        },
        ..sequential(shards)
    };
    let batch = &bench.batches(config, 1).unwrap()[0];
    let cut_at = |top, left| CropWindow {
        top,
        left,
        flipped: false,
    };
    let sample = &batch.samples[3];
    assert_eq!(&*sample.key, "000000003");
    assert_eq!(sample.caption, "picture 3");
    assert_eq!(sample.geometry.original, (23, 24));
    assert_eq!(sample.geometry.resized, (16, 16));
    assert_eq!(sample.geometry.crops, [cut_at(0, 0)]);
    let json = sample.json.as_ref().unwrap().as_ref().unwrap();
    assert_eq!(json.get("original_width"), Some(503.into()));
    // 20x24 becomes 16x19; the centre crop starts at 2, as Python's round(1.5).
    assert_eq!(batch.samples[0].geometry.resized, (16, 19));
    assert_eq!(batch.samples[0].geometry.crops, [cut_at(2, 0)]);
    assert_eq!(pixels(batch).len(), 4 * 3 * 16 * 16);
}

#[test]
fn cursor_of_other_stream_is_refused() {
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
        resumed(&|config| config.lanes = Lanes::all(2, 1))
            .unwrap()
            .contains("lanes = 1, and now it is 2")
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
fn dropped_stream_ends_promptly() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 4, |_| 30);
    let bench = Bench::embedded(root.path());
    for taken in [0, 1, 5] {
        let stream = bench.open(config(shards.clone())).unwrap();
        take(&stream, &bench.metrics, taken).unwrap();
        let start = Instant::now();
        drop(stream);
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    let snapshot = bench.metrics.snapshot();
    assert!(!snapshot.channels.contains_key("batches"), "{snapshot:?}");
}

#[test]
fn stages_count_items_and_bytes() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 6);
    let bench = Bench::embedded(root.path());
    bench.all(sequential(shards)).unwrap();
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

/// The content of a batch, without its number and cursor.
fn contents(batch: &Batch) -> (&[SampleMeta], &BatchData, &[SkippedSample]) {
    (&batch.samples, &batch.data, &batch.skipped)
}

#[test]
fn lanes_are_the_same_whoever_reads_them() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_faults(root.path(), 9);
    let bench = Bench::embedded(root.path());
    for resample in [false, true] {
        let read = |hosted: std::ops::Range<usize>| {
            let config = StreamConfig {
                resample,
                max_bad_fraction: 0.5,
                batch_size: 3,
                lanes: Lanes {
                    count: 4,
                    batches_in_turn: 2,
                    hosted: hosted.clone(),
                },
                ..config(shards.clone())
            };
            bench.batches(config, 3 * 2 * hosted.len()).unwrap()
        };
        let whole = read(0..4);
        let numbers: Vec<u64> = whole.iter().map(|batch| batch.index).collect();
        assert_eq!(numbers, Vec::from_iter(0..24));
        // Of each round, a process has the batches of its lanes.
        for hosted in [0..2, 2..4, 0..1, 1..2, 3..4] {
            let rounds = whole.chunks(8);
            let expected = rounds.flat_map(|round| &round[2 * hosted.start..2 * hosted.end]);
            let got = read(hosted.clone());
            assert!(
                got.iter().map(contents).eq(expected.map(contents)),
                "{hosted:?}"
            );
        }
        // The positions of two processes are that of one.
        let at =
            |batches: &[Batch], round: usize| batches[batches.len() / 3 * round - 1].cursor.clone();
        let (first, second) = (read(0..2), read(2..4));
        for round in 1..=3 {
            let joined = Cursor::join([at(&first, round), at(&second, round)]).unwrap();
            assert_eq!(joined, at(&whole, round));
        }
        assert!(Cursor::join([at(&first, 1), at(&whole, 1)]).is_err());
    }
}
