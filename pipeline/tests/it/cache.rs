//! Shards kept on local disk between epochs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coffey_pipeline::{CacheCounts, CacheOptions, S3Options, SourceOptions, StreamConfig};

use crate::support::web::{Request, Response, Web};
use crate::support::{Bench, sample, sequential, shard, take, tar_of, urls};

/// The headers a server sends with an object.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Headers {
    Tag,
    Length,
    None,
}

#[derive(Debug, Clone)]
struct Object {
    bytes: Vec<u8>,
    tag: &'static str,
    headers: Headers,
}

impl Object {
    fn answer(&self, request: &Request) -> Response {
        let range = request.header("range");
        let start: usize = match range.strip_prefix("bytes=") {
            Some(range) => range.trim_end_matches('-').parse().unwrap(),
            None => 0,
        };
        if self.headers == Headers::Tag && request.header("if-none-match") == self.tag {
            return Response::new(304, "");
        }
        let mut response = Response::new(if start > 0 { 206 } else { 200 }, &self.bytes[start..]);
        if start > 0 {
            let all = self.bytes.len();
            response = response.with("content-range", format!("bytes {start}-{}/{all}", all - 1));
        }
        match self.headers {
            Headers::Tag => response = response.with("etag", self.tag),
            Headers::Length => {}
            Headers::None => response.length = None,
        }
        response
    }
}

/// A server of shards `/data/N.tar`, over HTTP and as an S3 server, and the objects it serves.
fn server(shards: Vec<Vec<u8>>, headers: Headers) -> (Web, Arc<Mutex<Vec<Object>>>) {
    let objects: Vec<_> = shards
        .into_iter()
        .map(|bytes| Object {
            bytes,
            tag: "\"one\"",
            headers,
        })
        .collect();
    let objects = Arc::new(Mutex::new(objects));
    let served = Arc::clone(&objects);
    let web = Web::start(move |request| {
        let path = request.path.split('?').next().unwrap();
        let number = path.trim_start_matches("/data/").trim_end_matches(".tar");
        let object = served.lock().unwrap()[number.parse::<usize>().unwrap()].clone();
        object.answer(request)
    });
    (web, objects)
}

fn bench(web: &Web, folder: Option<(&Path, u64)>) -> Bench {
    Bench::new(SourceOptions {
        s3: S3Options {
            endpoint_url: Some(web.endpoint.clone()),
            path_style: true,
            anonymous: true,
            max_attempts: 2,
            ..S3Options::default()
        },
        cache: folder.map(|(folder, limit_bytes)| CacheOptions {
            folder: folder.to_owned(),
            limit_bytes,
        }),
        ..SourceOptions::default()
    })
}

fn in_order(url: &str) -> StreamConfig {
    sequential(urls(url))
}

fn counts(bench: &Bench) -> (u64, u64) {
    let CacheCounts { hits, misses } = bench.sources.cache_counts().unwrap();
    (hits, misses)
}

fn kept(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect()
}

/// Waits until `shards` shards are kept and none is being written.
fn settle(folder: &Path, shards: usize) {
    let start = Instant::now();
    while kept(folder, "shard").len() != shards || !kept(folder, "part").is_empty() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{:?} and {:?}",
            kept(folder, "shard"),
            kept(folder, "part")
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

const GIGABYTE: u64 = 1_000_000_000;

#[test]
fn cached_epoch_equals_fetched_epoch() {
    let (web, _) = server(vec![shard(0, 9), shard(1, 7)], Headers::Tag);
    for url in [
        "s3://data/{0..1}.tar".to_owned(),
        format!("{}/data/{{0..1}}.tar", web.endpoint),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let plain = bench(&web, None).all(in_order(&url)).unwrap();
        let bench = bench(&web, Some((folder.path(), GIGABYTE)));
        assert!(bench.all(in_order(&url)).unwrap() == plain);
        assert_eq!(counts(&bench), (0, 2));
        settle(folder.path(), 2);
        let before = web.seen().len();
        assert!(bench.all(in_order(&url)).unwrap() == plain);
        assert_eq!(counts(&bench), (2, 2));
        let asked = &web.seen()[before..];
        assert_eq!(asked.len(), 2);
        assert!(
            asked
                .iter()
                .all(|request| request.header("if-none-match") == "\"one\"")
        );
        // A kept shard begins with the tar itself, so other tools can read it.
        let first = std::fs::read(&kept(folder.path(), "shard")[0]).unwrap();
        assert!(first.starts_with(&shard(0, 9)) || first.starts_with(&shard(1, 7)));
    }
}

#[test]
fn cached_shard_is_fetched_again_when_changed() {
    let (web, objects) = server(vec![shard(0, 9)], Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&web, Some((folder.path(), GIGABYTE)));
    bench.all(in_order("s3://data/0.tar")).unwrap();
    settle(folder.path(), 1);
    (
        objects.lock().unwrap()[0].bytes,
        objects.lock().unwrap()[0].tag,
    ) = (shard(1, 9), "\"two\"");
    for (hits, misses) in [(0, 2), (1, 2)] {
        let all = bench.all(in_order("s3://data/0.tar")).unwrap();
        assert_eq!(&*all[0].samples[0].key, "000010000");
        assert_eq!(counts(&bench), (hits, misses));
        settle(folder.path(), 1);
    }
}

#[test]
fn cache_without_etag_compares_length() {
    let url = |web: &Web| format!("{}/data/0.tar", web.endpoint);
    let (web, objects) = server(vec![shard(0, 9)], Headers::Length);
    let folder = tempfile::tempdir().unwrap();
    let by_length = bench(&web, Some((folder.path(), GIGABYTE)));
    let first = by_length.all(in_order(&url(&web))).unwrap();
    settle(folder.path(), 1);
    assert!(by_length.all(in_order(&url(&web))).unwrap() == first);
    assert_eq!(counts(&by_length), (1, 1));
    objects.lock().unwrap()[0].bytes = shard(0, 10);
    let more: usize = by_length
        .all(in_order(&url(&web)))
        .unwrap()
        .iter()
        .map(|batch| batch.samples.len())
        .sum();
    assert_eq!((more, counts(&by_length)), (10, (1, 2)));

    let (web, _) = server(vec![shard(0, 9)], Headers::None);
    let folder = tempfile::tempdir().unwrap();
    let by_nothing = bench(&web, Some((folder.path(), GIGABYTE)));
    let first = by_nothing.all(in_order(&url(&web))).unwrap();
    assert!(by_nothing.all(in_order(&url(&web))).unwrap() == first);
    assert_eq!(counts(&by_nothing), (0, 2));
    drop(by_nothing);
    settle(folder.path(), 0);
}

#[test]
fn cache_keeps_no_partial_shard() {
    let whole = shard(0, 9);
    let web = Web::start(move |_| {
        let mut response = Response::new(200, &whole[..whole.len() / 2]).with("etag", "\"one\"");
        response.length = Some(whole.len());
        response
    });
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&web, Some((folder.path(), GIGABYTE)));
    bench.all(in_order("s3://data/0.tar")).unwrap_err();
    assert_eq!(counts(&bench), (0, 1));
    drop(bench);
    settle(folder.path(), 0);
}

#[test]
fn cache_folder_failure_does_not_stop_stream() {
    let (web, _) = server(vec![shard(0, 9)], Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let plain = bench(&web, None).all(in_order("s3://data/0.tar")).unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let no_folder = bench(&web, Some((&file.join("cache"), GIGABYTE)));
    assert!(no_folder.all(in_order("s3://data/0.tar")).unwrap() == plain);

    let cache = folder.path().join("cache");
    let bench = bench(&web, Some((&cache, GIGABYTE)));
    std::fs::remove_dir(&cache).unwrap();
    for _ in 0..2 {
        assert!(bench.all(in_order("s3://data/0.tar")).unwrap() == plain);
    }
    assert_eq!(counts(&bench), (0, 2));
}

#[test]
fn cached_shard_is_fetched_again_when_damaged() {
    let (web, _) = server(vec![shard(0, 9)], Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&web, Some((folder.path(), GIGABYTE)));
    let plain = bench.all(in_order("s3://data/0.tar")).unwrap();
    settle(folder.path(), 1);
    let path = kept(folder.path(), "shard").remove(0);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1000]).unwrap();
    assert!(bench.all(in_order("s3://data/0.tar")).unwrap() == plain);
    assert_eq!(counts(&bench), (0, 2));
    settle(folder.path(), 1);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn cached_shard_with_other_bytes_ends_the_run_and_is_fetched_again() {
    // In the content of a member, in the first header, and in a later one.
    for place in ["content", "first header", "later header"] {
        let (web, _) = server(vec![shard(0, 9)], Headers::Tag);
        let folder = tempfile::tempdir().unwrap();
        let bench = bench(&web, Some((folder.path(), GIGABYTE)));
        let plain = bench.all(in_order("s3://data/0.tar")).unwrap();
        settle(folder.path(), 1);
        let path = kept(folder.path(), "shard").remove(0);
        let mut bytes = std::fs::read(&path).unwrap();
        let headers = bytes.windows(5).enumerate();
        let mut headers = headers
            .filter(|(_, five)| *five == b"ustar")
            .map(|(at, _)| at);
        let byte = match place {
            "content" => 600,
            "first header" => headers.next().unwrap(),
            _ => headers.nth(3).unwrap(),
        };
        bytes[byte] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = bench.error(in_order("s3://data/0.tar")).to_string();
        assert!(
            error.contains("s3://data/0.tar: its copy in data.cache_dir"),
            "{error}"
        );
        assert!(
            error.contains(path.to_str().unwrap()) && !path.exists(),
            "{error}"
        );
        assert!(bench.all(in_order("s3://data/0.tar")).unwrap() == plain);
        settle(folder.path(), 1);
        assert!(bench.all(in_order("s3://data/0.tar")).unwrap() == plain);
        assert_eq!(counts(&bench), (2, 2));
    }
}

#[test]
fn cache_read_failure_continues_from_server() {
    // Large enough that the stream does not hold the whole shard in memory.
    let noise: Vec<u8> = (0..1_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let members: Vec<_> = (0..64)
        .flat_map(|n| {
            let mut members = sample(0, n);
            members.push((format!("{:05}{n:04}.bin", 0), noise.clone()));
            members
        })
        .collect();
    let (web, _) = server(vec![tar_of(&members)], Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&web, Some((folder.path(), GIGABYTE)));
    let plain = bench.all(in_order("s3://data/0.tar")).unwrap();
    settle(folder.path(), 1);
    let stream = bench.open(in_order("s3://data/0.tar")).unwrap();
    let mut batches = take(&stream, &bench.metrics, 1).unwrap();
    let path = kept(folder.path(), "shard").remove(0);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1000).unwrap();
    batches.extend(take(&stream, &bench.metrics, usize::MAX).unwrap());
    assert!(batches == plain);
    assert_eq!(counts(&bench), (1, 1));
    let last = web.seen().pop().unwrap();
    assert!(last.header("range").starts_with("bytes="), "{last:?}");
    assert_eq!(last.header("if-match"), "\"one\"");
    assert!(!path.exists());
}

#[test]
fn cache_evicts_oldest_beyond_limit() {
    let shards: Vec<_> = (0..4).map(|n| shard(n, 9)).collect();
    let limit = shards
        .iter()
        .take(2)
        .map(|shard| shard.len() as u64)
        .sum::<u64>()
        + 2000;
    let (web, _) = server(shards, Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&web, Some((folder.path(), limit)));
    for number in [0, 1, 0, 2] {
        bench
            .all(in_order(&format!("s3://data/{number}.tar")))
            .unwrap();
        settle(
            folder.path(),
            if number == 0 && counts(&bench).1 == 1 {
                1
            } else {
                2
            },
        );
    }
    assert_eq!(counts(&bench), (1, 3));
    for (number, hits) in [(0, 2), (2, 3), (1, 3)] {
        bench
            .all(in_order(&format!("s3://data/{number}.tar")))
            .unwrap();
        assert_eq!(counts(&bench).0, hits, "{number}.tar");
    }
    let smaller = tempfile::tempdir().unwrap();
    let bench = self::bench(&web, Some((smaller.path(), 1000)));
    bench.all(in_order("s3://data/0.tar")).unwrap();
    drop(bench);
    settle(smaller.path(), 0);
}

#[test]
fn cache_folder_can_be_shared() {
    let shards: Vec<_> = (0..5).map(|n| shard(n, 6)).collect();
    // Room for about two shards: each thread evicts what the others read.
    let limit = 2 * shards[0].len() as u64 + 2000;
    let (web, _) = server(shards, Headers::Tag);
    let folder = tempfile::tempdir().unwrap();
    let plain = bench(&web, None)
        .all(in_order("s3://data/{0..4}.tar"))
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let bench = bench(&web, Some((folder.path(), limit)));
                for _ in 0..8 {
                    assert!(bench.all(in_order("s3://data/{0..4}.tar")).unwrap() == plain);
                }
            });
        }
    });
    let bytes: u64 = kept(folder.path(), "shard")
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    assert!(bytes <= limit, "{bytes} of {limit}");
    assert!(kept(folder.path(), "part").is_empty());
}
