//! Shards that a manifest lists: those that differ from their entry end the stream.

use std::path::Path;

use crate::support::web::{Response, Web};
use crate::support::{Bench, bucket, config, keys, sequential, shard, urls};
use coffey_pipeline::{ListedShard, ShardUrl, StreamConfig, StreamError};
use sha2::{Digest, Sha256};

const SHARDS: u32 = 3;
const SAMPLES: u32 = 5;

fn entry(content: &[u8]) -> ListedShard {
    ListedShard {
        bytes: content.len() as u64,
        sha256: format!("{:x}", Sha256::digest(content)),
        samples: u64::from(SAMPLES),
    }
}

/// The entries of the shards of [`bucket`].
fn entries() -> Vec<ListedShard> {
    let entries = (0..SHARDS).map(|n| entry(&shard(n, SAMPLES)));
    entries.collect()
}

fn listed(config: StreamConfig, entries: Vec<ListedShard>) -> StreamConfig {
    StreamConfig {
        listed: Some(entries.into()),
        ..config
    }
}

/// Changes of shard 1 of the bucket, and the property by which each is found.
fn changes() -> Vec<(&'static str, Vec<u8>)> {
    let whole = shard(1, SAMPLES);
    let changed = |at: usize| {
        let mut content = whole.clone();
        content[at] ^= 1;
        content
    };
    let zeroed = |from: usize, to: usize| {
        let mut content = whole.clone();
        content[from..to].fill(0);
        content
    };
    let find = |text: &[u8]| whole.windows(text.len()).position(|w| w == text).unwrap();
    let third = find(b"000010002.png");
    vec![
        ("size in bytes", whole[..whole.len() - 1024].to_vec()),
        ("size in bytes", [&whole[..], &[0; 512]].concat()),
        ("size in bytes", Vec::new()),
        ("SHA-256", shard(2, SAMPLES)),
        // In an image, in a header, at the end of the archive, and an end in the middle.
        ("SHA-256", changed(600)),
        ("SHA-256", changed(third + 150)),
        ("SHA-256", changed(whole.len() - 1)),
        ("SHA-256", zeroed(third, whole.len())),
    ]
}

fn different(error: StreamError) -> (String, &'static str, String, String) {
    match error {
        StreamError::OtherThanManifest {
            url,
            what,
            found,
            listed,
        } => (url, what, found, listed),
        other => panic!("{other}"),
    }
}

#[test]
fn listed_shards_that_are_as_listed_change_nothing() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), SHARDS, |_| SAMPLES);
    let bench = Bench::embedded(root.path());
    let plain = bench.batches(config(shards.clone()), 12).unwrap();
    let listed_config = listed(config(shards.clone()), entries());
    let checked = bench.batches(listed_config.clone(), 12).unwrap();
    assert_eq!(plain, checked);
    // A resume begins in the middle of its open shards, which are read whole again.
    let resume = Some(checked[4].cursor.clone());
    let resumed = StreamConfig {
        resume: resume.clone(),
        ..listed_config
    };
    let rest = bench.batches(resumed.clone(), 7).unwrap();
    assert_eq!(keys(&rest), keys(&checked[5..]));
    let path = root.path().join("data/00001.tar");
    for (what, content) in changes().split_off(4) {
        std::fs::write(&path, content).unwrap();
        assert_eq!(different(bench.error(resumed.clone())).1, what);
    }
}

#[test]
fn listed_shards_that_differ_end_the_stream_from_every_source() {
    let root = tempfile::tempdir().unwrap();
    let embedded = bucket(root.path(), SHARDS, |_| SAMPLES);
    let folder = root.path().join("data");
    let local: Vec<ShardUrl> = (0..SHARDS)
        .map(|n| ShardUrl::file(folder.join(format!("{n:05}.tar"))))
        .collect();
    let serve = |has_length: bool| {
        let folder = folder.clone();
        Web::start(move |request| {
            let content = std::fs::read(folder.join(&request.path[1..])).unwrap();
            let mut response = Response::new(200, content);
            response.length = response.length.filter(|_| has_length);
            response
        })
    };
    let servers = [serve(true), serve(false)];
    let [sized, unsized_] = servers
        .each_ref()
        .map(|web| urls(&format!("{}/{{00000..00002}}.tar", web.endpoint)));
    let bench = Bench::embedded(root.path());
    for (what, content) in changes() {
        std::fs::write(folder.join("00001.tar"), &content).unwrap();
        let (found, listed_entry) = (entry(&content), &entries()[1]);
        for shards in [&embedded, &local, &sized, &unsized_] {
            let url = shards[1].clone();
            let error = bench.error(listed(sequential(shards.clone()), entries()));
            assert!(!error.is_config());
            let (values, found) = match what {
                "size in bytes" => (listed_entry.bytes.to_string(), found.bytes.to_string()),
                _ => (listed_entry.sha256.clone(), found.sha256.clone()),
            };
            assert_eq!(different(error), (url.to_string(), what, found, values));
        }
    }
}

#[test]
fn listed_size_is_compared_before_a_sample_is_used() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), SHARDS, |_| SAMPLES);
    let bench = Bench::embedded(root.path());
    let mut wrong = entries();
    wrong[0].bytes += 512;
    let stream = bench.open(listed(sequential(shards), wrong)).unwrap();
    let first = stream.batches().recv_untimed().unwrap();
    assert_eq!(different(first.unwrap_err()).1, "size in bytes");
}

#[test]
fn listed_number_of_samples_is_compared() {
    let root = tempfile::tempdir().unwrap();
    let shards = bucket(root.path(), SHARDS, |_| SAMPLES);
    let bench = Bench::embedded(root.path());
    let mut wrong = entries();
    wrong[2].samples += 1;
    let error = different(bench.error(listed(sequential(shards.clone()), wrong)));
    let url = shards[2].to_string();
    assert_eq!(error, (url, "number of samples", "5".into(), "6".into()));
    let error = bench.error(listed(sequential(shards), entries()[..2].to_vec()));
    assert!(error.is_config());
}

#[test]
fn named_pipe_is_no_shard() {
    let root = tempfile::tempdir().unwrap();
    let pipe = root.path().join("pipe.tar");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    let bench = Bench::embedded(root.path());
    let refused = |url: &Path| {
        let error = bench
            .error(sequential(vec![ShardUrl::file(url)]))
            .to_string();
        assert!(error.contains(url.to_str().unwrap()), "{error}");
        error
    };
    assert!(refused(&pipe).contains("it is a named pipe, not a file"));
    assert!(refused(Path::new("/dev/zero")).contains("it is a device, not a file"));
    assert!(refused(root.path()).contains("is a folder; end it with '/'"));
}
