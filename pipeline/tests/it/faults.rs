//! Broken shards and samples, and how a stream reports them.

use crate::support::{Bench, bucket, config, keys, sample, sequential, shard, take, tar_of};
use coffey_pipeline::{Filter, Lanes, Order, ShardUrl, StreamConfig, StreamError, Undelivered};

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
    let stream = bench.open(config.clone()).unwrap();
    let error = take(&stream, &bench.metrics, 1).unwrap_err();
    assert!(
        matches!(error, StreamError::NothingUsable { .. }),
        "{error}"
    );
    let rest = stream.take_undelivered();
    let shards = &rest.finished_shards;
    assert_eq!((shards.len(), shards[0].skipped["too_large"]), (1, 3));
    assert_eq!(rest.skipped.len(), 3);
    assert_eq!(stream.take_undelivered(), Undelivered::default());
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

/// A configuration that draws shards with replacement and reads `shards` one after the other.
fn draws(shards: Vec<ShardUrl>, seed: u64) -> StreamConfig {
    StreamConfig {
        resample: true,
        open_shards: 1,
        seed,
        ..config(shards)
    }
}

#[test]
fn draws_go_on_while_any_shard_has_samples() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 16, |n| 1 + u32::from(n == 11) * 9);
    let bench = Bench::embedded(root.path());
    for n in (0..16).filter(|n| n % 3 == 0) {
        let empty = if n % 2 == 0 { tar_of(&[]) } else { Vec::new() };
        std::fs::write(root.path().join(format!("data/{n:05}.tar")), empty).unwrap();
    }
    // Only shard 11 has samples that pass.
    let filter = Filter {
        min_size: Some(505),
        ..Filter::default()
    };
    let mut completed = 0;
    for seed in 0..30 {
        if seed >= 3 && completed > 0 {
            break;
        }
        let settings = |resume| StreamConfig {
            filter: filter.clone(),
            shuffle_buffer: 3,
            batch_size: 2,
            resume,
            ..draws(shards.clone(), seed)
        };
        let whole = bench.batches(settings(None), 9).unwrap();
        assert!(keys(&whole).iter().all(|key| key.starts_with("00011")));
        let cursors: Vec<String> = whole[..8]
            .iter()
            .map(|batch| serde_json::to_string(&batch.cursor).unwrap())
            .collect();
        // An epoch of draws had no sample.
        let missed = cursors.iter().any(|json| json.contains("complement"));
        completed += usize::from(missed);
        for (n, json) in cursors.iter().enumerate().filter(|_| missed) {
            let cursor = serde_json::from_str(json).unwrap();
            let rest = bench.batches(settings(Some(cursor)), 8 - n).unwrap();
            assert_eq!(rest, whole[n + 1..], "seed {seed}, from batch {n}");
        }
    }
    assert!(completed > 0, "no epoch of draws was without a sample");
}

#[test]
fn draws_end_once_every_shard_was_read_in_vain() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 12, |_| 3);
    let filter = Filter {
        min_size: Some(900),
        ..Filter::default()
    };
    for (resample, lane, lanes) in [(true, 0, 1), (true, 1, 3), (false, 0, 1), (false, 2, 3)] {
        let bench = Bench::embedded(root.path());
        let stream = bench.open(StreamConfig {
            filter: filter.clone(),
            resample,
            lanes: Lanes::one(lane, lanes),
            ..draws(shards.clone(), 5)
        });
        let stream = stream.unwrap();
        let error = take(&stream, &bench.metrics, 1).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("the first filter:min_size is sample"),
            "{text}"
        );
        let rest = stream.take_undelivered();
        let read: std::collections::BTreeSet<_> =
            rest.finished_shards.iter().map(|s| s.shard).collect();
        assert_eq!(read.len(), 12, "{resample} {lane} {lanes}");
        assert!(rest.finished_shards.len() < 24, "{resample} {lane} {lanes}");
        assert_eq!(rest.skipped.len(), 3 * rest.finished_shards.len());
    }
}

#[test]
fn draws_of_undecodable_images_end() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 3, |_| 1);
    for n in 0..3 {
        let mut members = sample(n, 0);
        members[0].1 = b"not an image".to_vec();
        let path = root.path().join(format!("data/{n:05}.tar"));
        std::fs::write(path, tar_of(&members)).unwrap();
    }
    let bench = Bench::embedded(root.path());
    let error = bench.error(StreamConfig {
        max_bad_fraction: 1.0,
        ..draws(shards, 1)
    });
    let text = error.to_string();
    assert!(
        text.starts_with("no sample can be used")
            && text.contains("the first decode_error is sample \"0000"),
        "{text}"
    );
}

#[test]
fn few_draws_do_not_decide_that_too_much_is_broken() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 2, |n| 1 + 149 * n);
    std::fs::write(
        root.path().join("data/00000.tar"),
        tar_of(&[("a.txt".to_owned(), b"no image".to_vec())]),
    )
    .unwrap();
    let bench = Bench::embedded(root.path());
    for seed in 0..6 {
        bench.batches(draws(shards.clone(), seed), 8).unwrap();
    }
}

#[test]
fn error_names_a_sample_its_members_and_the_key_to_set() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 1);
    let bench = Bench::embedded(root.path());
    let picture = || sample(0, 0).remove(0).1;
    let member = |name: &str, content: &[u8]| (name.to_owned(), content.to_vec());
    let text = |members: &[(String, Vec<u8>)]| {
        std::fs::write(root.path().join("data/00000.tar"), tar_of(members)).unwrap();
        bench.error(sequential(shards.clone())).to_string()
    };
    let named = text(&[
        member("in/s.0.input.png", &picture()),
        member("in/s.0.outputs.txt", b"a cat"),
    ]);
    assert!(
        named.contains("sample \"in/s\" of s3://data/00000.tar, which has the members 0.input.png, 0.outputs.txt")
            && named.contains("add \"0.input.png\" to data.image_keys"),
        "{named}"
    );
    let mut unsorted: Vec<_> = (0..3)
        .map(|n| member(&format!("{n}.png"), &picture()))
        .collect();
    unsorted.extend((0..3).map(|n| member(&format!("{n}.txt"), b"a cat")));
    let unsorted = text(&unsorted);
    assert!(
        unsorted.contains("sample \"0\"")
            && unsorted.contains("other members elsewhere in the shard")
            && unsorted.contains("tar --sort=name"),
        "{unsorted}"
    );
    assert!(text(&[]).contains("s3://data/00000.tar holds no sample"));
    std::fs::write(root.path().join("data/00000.tar"), b"").unwrap();
    let empty = bench.error(sequential(shards.clone())).to_string();
    assert!(
        empty.contains("the first broken_shard is s3://data/00000.tar, which is empty: 0 bytes"),
        "{empty}"
    );
}

#[test]
fn repeated_members_and_keys_are_skipped_where_a_tar_is_written() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), 1, |_| 1);
    let bench = Bench::embedded(root.path());
    let picture = sample(0, 0).remove(0).1;
    let read = |names: &[&str], skip_duplicate_keys| {
        let content = |name: &str| match name.rsplit_once('.') {
            Some((_, "png")) if name.starts_with("broken") => b"broken".to_vec(),
            Some((_, "png")) => picture.clone(),
            _ => name.as_bytes().to_vec(),
        };
        let members: Vec<_> = names
            .iter()
            .map(|n| ((*n).to_owned(), content(n)))
            .collect();
        std::fs::write(root.path().join("data/00000.tar"), tar_of(&members)).unwrap();
        let batches = bench
            .all(StreamConfig {
                skip_duplicate_keys,
                max_bad_fraction: 0.5,
                ..sequential(shards.clone())
            })
            .unwrap();
        let summary = batches.last().unwrap().finished_shards[0].clone();
        let skipped: Vec<_> = summary.skipped.into_iter().collect();
        (keys(&batches).join(" "), skipped)
    };
    let skips = |reason: &str, count| vec![(reason.to_owned(), count)];
    let twice = ["a.png", "a.txt", "a.png", "a.txt", "b.png", "b.txt"];
    assert_eq!(read(&twice, false), ("a a b".to_owned(), Vec::new()));
    assert_eq!(
        read(&twice, true),
        ("a b".to_owned(), skips("duplicate_key", 1))
    );
    // A sample between two of one key is left out: they would be neighbours.
    let parted = [
        "a.png",
        "a.txt",
        "broken.png",
        "broken.txt",
        "a.png",
        "a.txt",
        "b.png",
        "b.txt",
    ];
    let (written, skipped) = read(&parted, true);
    assert_eq!((written.as_str(), skipped.len()), ("a b", 2));
    assert_eq!(read(&parted, false).0, "a a b");
    // Keys that return later are other samples.
    let later = ["a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt"];
    assert_eq!(read(&later, true), ("a b a".to_owned(), Vec::new()));
    for (repeated, parts) in [
        (&["a.png", "a.png", "a.txt", "b.png", "b.txt"][..], 1),
        (&["a.png", "a.txt", "a.txt", "b.png", "b.txt"], 1),
        (&["a.png", "a.png", "a.txt", "a.txt", "b.png", "b.txt"], 2),
    ] {
        let expected = ("a b".to_owned(), skips("duplicate_member", parts));
        assert_eq!(read(repeated, true), expected, "{repeated:?}");
        assert_eq!(read(repeated, false), expected, "{repeated:?}");
    }
}
