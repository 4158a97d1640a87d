//! Broken shards and samples, and how a stream reports them.

use crate::support::{Bench, bucket, config, keys, sample, sequential, shard, tar_of};
use coffey_pipeline::{Filter, Order, ShardUrl, StreamConfig, StreamError};

#[test]
fn non_tar_ends_stream_with_its_url() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 2);
    let bench = Bench::embedded(root.path());
    let page = [b"<html>sign in</html>".as_slice(), &[b' '; 2000]].concat();
    for content in [page, vec![0x55; 9000], b"short".to_vec()] {
        std::fs::write(root.path().join("data/00001.tar"), content).unwrap();
        let error = bench.error(sequential(shards.clone()));
        assert!(
            error
                .to_string()
                .starts_with("s3://data/00001.tar is not a tar"),
            "{error}"
        );
    }
}

#[test]
fn cut_tar_is_used_up_to_the_cut() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 4);
    let whole = shard(0, 4);
    std::fs::write(
        root.path().join("data/00000.tar"),
        &whole[..whole.len() / 2],
    )
    .unwrap();
    let bench = Bench::embedded(root.path());
    let batches = bench.all(sequential(shards)).unwrap();
    let found = keys(&batches);
    assert!(
        found.contains(&"000000000".to_owned()) && found.contains(&"000010003".to_owned()),
        "{found:?}"
    );
    assert!(!found.contains(&"000000003".to_owned()));
    let summaries: Vec<_> = batches
        .iter()
        .flat_map(|b| b.finished_shards.clone())
        .collect();
    assert!(
        summaries[0].broken.as_ref().unwrap().contains("member"),
        "{summaries:?}"
    );
    assert_eq!(summaries[1].broken, None);
    assert_eq!(bench.metrics.snapshot().skipped["broken_shard"], 1);
}

fn with_broken(root: &std::path::Path, broken: impl Fn(u32) -> bool) -> Vec<ShardUrl> {
    let shards = bucket(root, 1, |_| 1);
    let members: Vec<_> = (0..200)
        .flat_map(|n| {
            let mut members = sample(0, n);
            if broken(n) {
                match n % 4 {
                    0 => members[0].1 = b"not an image".to_vec(),
                    1 => members[0].1.truncate(70),
                    missing => {
                        members.remove(missing as usize - 2);
                    }
                }
            }
            members
        })
        .collect();
    std::fs::write(root.join("data/00000.tar"), tar_of(&members)).unwrap();
    shards
}

#[test]
fn broken_samples_are_skipped_and_counted() {
    let root = tempfile::tempdir().unwrap();
    let shards = with_broken(root.path(), |n| (190..198).contains(&n));
    let bench = Bench::embedded(root.path());
    let batches = bench.all(sequential(shards)).unwrap();
    assert_eq!(keys(&batches).len(), 192);
    let summary = &batches.last().unwrap().finished_shards[0];
    assert_eq!(summary.samples, 192);
    let counts: Vec<(&str, u64)> = summary
        .skipped
        .iter()
        .map(|(k, v)| (k.as_str(), *v))
        .collect();
    assert_eq!(
        counts,
        [("decode_error", 4), ("no_caption", 2), ("no_image", 2)]
    );
    assert_eq!(bench.metrics.snapshot().skipped, summary.skipped);
}

#[test]
fn too_many_broken_samples_end_stream() {
    for order in [Order::Shuffled, Order::Sequential] {
        let root = tempfile::tempdir().unwrap();
        let shards = with_broken(root.path(), |n| n % 3 == 0);
        let bench = Bench::embedded(root.path());
        let error = bench.error(StreamConfig {
            order,
            ..config(shards)
        });
        assert!(
            matches!(error, StreamError::TooManyBroken { .. }),
            "{error:?}"
        );
        let text = error.to_string();
        for part in [
            "max_bad_fraction = 0.05",
            "no_image",
            "no_caption",
            "decode_error",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn few_mostly_broken_samples_end_stream_at_epoch_end() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 1);
    let mut members = sample(0, 0);
    members.extend((1..4).map(|n| (format!("{n}.txt"), b"no image".to_vec())));
    std::fs::write(root.path().join("data/00000.tar"), tar_of(&members)).unwrap();
    let bench = Bench::embedded(root.path());
    let text = bench.error(sequential(shards)).to_string();
    assert!(text.starts_with("3 of 4 samples are broken"), "{text}");
}

#[test]
fn oversized_images_are_skipped_undecoded() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 3);
    let bench = Bench::embedded(root.path());
    let mut config = sequential(shards);
    config.max_bad_fraction = 1.0;
    config.image.max_pixels = 21 * 24;
    let batches = bench.all(config.clone()).unwrap();
    assert_eq!(keys(&batches).len(), 2);
    assert_eq!(batches[0].finished_shards[0].skipped["too_large"], 1);
    config.image.max_pixels = 1;
    let error = bench.error(config.clone());
    let StreamError::NothingUsable {
        shards, skipped, ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((shards.len(), shards[0].skipped["too_large"]), (1, 3));
    assert_eq!(skipped.len(), 3);
    config.image.max_bytes = 10;
    let text = bench.error(config).to_string();
    assert!(text.contains("too_large 3"), "{text}");
}

#[test]
fn filter_that_rejects_everything_says_why() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 5);
    let bench = Bench::embedded(root.path());
    for order in [Order::Shuffled, Order::Sequential] {
        let error = bench.error(StreamConfig {
            order,
            filter: Filter {
                min_size: Some(503),
                min_aesthetic: Some(5.0),
                ..Filter::default()
            },
            ..config(shards.clone())
        });
        let text = error.to_string();
        assert!(
            text.contains(
                "15 samples seen; left out: filter:min_aesthetic_missing 6, filter:min_size 9"
            ),
            "{text}"
        );
        assert!(
            text.contains("no sample's json has the key aesthetic"),
            "{text}"
        );
        assert!(!text.contains("original_width"), "{text}");
    }
}

#[test]
fn filter_rejects_by_size_and_watermark() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |_| 5);
    let bench = Bench::embedded(root.path());
    let batches = bench
        .all(StreamConfig {
            filter: Filter {
                min_size: Some(503),
                max_pwatermark: Some(0.0),
                ..Filter::default()
            },
            ..sequential(shards)
        })
        .unwrap();
    assert_eq!(
        keys(&batches),
        ["000000003", "000000004", "000010003", "000010004"]
    );
    assert_eq!(bench.metrics.snapshot().skipped["filter:min_size"], 6);
}
