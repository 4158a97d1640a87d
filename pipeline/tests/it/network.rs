//! Faults between a server and the stream: a real S3 server behind a proxy that injects them.
//!
//! Each fault is checked for `s3://` and for `http://`, which share the retries.

use std::time::{Duration, Instant};

use crate::support::proxy::{Fault, Rule, clean, script};
use crate::support::{
    Bench, Faulty, bucket, keys, read_object, sample, sequential, shard, take, tar_of, urls,
};
use coffey_pipeline::{S3Options, SourceError, StreamError};

/// The result of a stream over one shard of nine samples, from S3 and from plain HTTP.
fn over(
    faults: &[Fault],
    max_attempts: u32,
) -> Vec<(Result<Vec<String>, StreamError>, Faulty, Bench)> {
    (0..2)
        .map(|kind| {
            let server = Faulty::start(script(faults.iter().cloned().map(Some)));
            server.write("00000.tar", &shard(0, 9));
            let bench = server.bench(max_attempts);
            let result = bench
                .all(sequential(urls(&server.both("00000.tar")[kind])))
                .map(|batches| keys(&batches));
            (result, server, bench)
        })
        .collect()
}

fn whole() -> Vec<String> {
    (0..9).map(|n| format!("00000{n:04}")).collect()
}

/// The offset at which each request began to read.
fn offsets(server: &Faulty) -> Vec<usize> {
    let begin = |head: &String| {
        let range = head.lines().find_map(|l| l.strip_prefix("range: bytes="));
        range.map_or(0, |r| r.trim_end_matches('-').parse().unwrap())
    };
    server.proxy.requests().iter().map(begin).collect()
}

fn is_s3(server: &Faulty) -> bool {
    server.proxy.requests()[0].contains("x-id=getobject")
}

/// Random bytes.
fn noise(length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(9);
    std::iter::repeat_with(|| random.u8(..))
        .take(length)
        .collect()
}

#[test]
fn broken_body_resumes_at_its_byte() {
    let faults = [
        Fault::Status(503, "SlowDown"),
        Fault::Short(5000),
        Fault::Short(0),
        Fault::Stall(3000),
        Fault::Status(500, "InternalError"),
        Fault::Hangup,
        Fault::Reset(2500),
    ];
    for (result, server, bench) in over(&faults, 10) {
        assert_eq!(result.unwrap(), whole());
        let offsets = offsets(&server);
        assert_eq!(offsets.len(), 8, "{offsets:?}");
        assert_eq!(offsets[..4], [0, 0, 5000, 5000]);
        assert!((5001..8000).contains(&offsets[4]), "{offsets:?}");
        assert_eq!(offsets[4..7], [offsets[4]; 3]);
        assert!(offsets[7] >= offsets[6], "{offsets:?}");
        for request in &server.proxy.requests()[2..] {
            assert!(request.contains("if-match: \""), "{request}");
        }
        if is_s3(&server) {
            let retries = bench.sources.s3_server().counts().retries;
            assert_eq!(retries.values().sum::<u64>(), 7, "{retries:?}");
            assert_eq!((retries["throttled"], retries["stalled"]), (1, 1));
        }
    }
}

/// One object for each fault and offset, all read at once; the first request for each object fails.
#[test]
fn fault_at_any_byte_is_recovered() {
    let content = shard(3, 2);
    let places: Vec<usize> = (0..700)
        .step_by(13)
        .chain((700..content.len()).step_by(397))
        .collect();
    let faults: Vec<Fault> = places
        .iter()
        .flat_map(|at| [Fault::Reset(*at), Fault::Stall(*at), Fault::Short(*at)])
        .collect();
    let count = faults.len();
    let rule: Rule = Box::new(move |head, nth| {
        let name = head.split("/data/").nth(1)?.split(".tar").next()?;
        let fault = &faults[name.parse::<usize>().ok()?];
        (nth == 0).then(|| fault.clone())
    });
    let server = Faulty::start(rule);
    for n in 0..count {
        server.write(&format!("{n}.tar"), &content);
    }
    let bench = server.bench(10);
    for kind in 0..2 {
        let reads = (0..count).map(|n| {
            let (sources, url) = (
                bench.sources.clone(),
                server.both(&format!("{n}.tar"))[kind].clone(),
            );
            bench
                .runtime
                .spawn(async move { (read_object(&sources, &url).await, url) })
        });
        for read in reads.collect::<Vec<_>>() {
            let (bytes, url) = bench.runtime.block_on(read).unwrap();
            assert!(bytes.unwrap() == content, "{url}");
        }
    }
    assert!(server.proxy.requests().len() > 3 * count, "{count}");
}

#[test]
fn server_without_ranges_is_read_again() {
    for (result, _, _) in over(&[Fault::Short(5000), Fault::IgnoreRange], 10) {
        assert_eq!(result.unwrap(), whole());
    }
}

#[test]
fn wrong_content_length_gives_no_wrong_bytes() {
    // Where `Content-Range` gives the size as well, the rest is fetched.
    for fault in [Fault::Longer(700), Fault::Shorter(700)] {
        for (result, _, _) in over(&[Fault::Short(5000), fault.clone()], 10) {
            assert_eq!(result.unwrap(), whole());
        }
    }
    // Where the length is the only source: a length that is too large ends the stream with the name,
    for (result, _, _) in over(&[Fault::Longer(700)], 10) {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("00000.tar: the object changed"), "{error}");
        assert!(error.contains("416"), "{error}");
    }
    // and one that is too small cuts the tar off.
    let server = Faulty::start(script([Some(Fault::Shorter(6000))]));
    server.write("00000.tar", &shard(0, 9));
    let bench = server.bench(10);
    let batches = bench.all(sequential(urls("s3://data/00000.tar"))).unwrap();
    let summary = &batches.last().unwrap().finished_shards[0];
    assert!(summary.broken.is_some(), "{summary:?}");
    assert!(whole().starts_with(&keys(&batches)));
}

#[test]
fn object_versions_are_never_spliced() {
    for fault in [
        Fault::OtherVersion,
        Fault::Status(412, "PreconditionFailed"),
    ] {
        for (result, _, _) in over(&[Fault::Short(5000), fault.clone()], 10) {
            let error = result.unwrap_err();
            let changed = matches!(
                &error,
                StreamError::Source(SourceError::Changed { offset: 5000, .. })
            );
            assert!(changed, "{error:?}");
            assert!(
                error.to_string().contains("00000.tar: the object changed"),
                "{error}"
            );
        }
    }
}

/// The server ignores `If-Match`, so the client has to compare ETags.
#[test]
fn replaced_object_ends_read_with_its_name() {
    for kind in 0..2 {
        for replacement in [shard(1, 9), shard(1, 8)] {
            let server = Faulty::start(clean());
            server.write("00000.tar", &shard(0, 9));
            let path = server.root.path().join("data/00000.tar");
            server.proxy.follow(Box::new(move |_, nth| {
                if nth > 0 {
                    std::fs::write(&path, &replacement).unwrap();
                }
                (nth == 0).then_some(Fault::Reset(9000))
            }));
            let url = &server.both("00000.tar")[kind];
            let error = server.bench(10).read(url).unwrap_err();
            assert!(matches!(error, SourceError::Changed { .. }), "{error:?}");
            assert!(error.to_string().starts_with(url.as_str()), "{error}");
        }
    }
}

#[test]
fn spent_retry_budget_names_url_and_cause() {
    for (fault, cause) in [
        (Fault::Status(503, "SlowDown"), "503"),
        (Fault::Stall(0), "no data for 0.3 s"),
        (Fault::Short(0), "the body"),
        (Fault::Reset(3000), "the body broke off"),
    ] {
        for (result, server, _) in over(&vec![fault.clone(); 9], 3) {
            let error = result.unwrap_err();
            assert!(!error.is_config());
            let text = error.to_string();
            assert!(
                text.contains("00000.tar: gave up after 3 attempts"),
                "{text}"
            );
            assert!(text.contains(cause), "{text}");
            assert_eq!(server.proxy.requests().len(), 3);
        }
    }
}

#[test]
fn retry_budget_is_restored_by_progress() {
    let content = noise(7 << 20);
    let server = Faulty::start(clean());
    server.write("long", &content);
    for url in server.both("long") {
        server
            .proxy
            .follow(Box::new(|_, _| Some(Fault::Short(1_200_000))));
        assert!(server.bench(2).read(&url).unwrap() == content);
        assert_eq!(server.proxy.requests().len(), 7);
        // A server that breaks off every 100 kB is given up.
        server
            .proxy
            .follow(Box::new(|_, _| Some(Fault::Short(100_000))));
        let error = server.bench(4).read(&url).unwrap_err();
        let spent = matches!(
            error,
            SourceError::Exhausted {
                attempts: 4,
                offset: 400_000,
                ..
            }
        );
        assert!(spent, "{error:?}");
    }
}

#[test]
fn read_refusals_end_at_once_with_hint() {
    for (status, code, kind, hints) in [
        (
            403,
            "AccessDenied",
            "access denied",
            ["[s3] anonymous = true", "signed URL"],
        ),
        (404, "NoSuchKey", "not found", ["range in braces"; 2]),
        (
            301,
            "PermanentRedirect",
            "301",
            ["set [s3] region = \"eu-west-1\"", "301"],
        ),
        (
            400,
            "AuthorizationHeaderMalformed",
            "400",
            ["set [s3] region = \"eu-west-1\"", "400"],
        ),
    ] {
        for ((result, server, _), hint) in over(&[Fault::Status(status, code)], 10)
            .into_iter()
            .zip(hints)
        {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(kind) && text.contains(hint), "{text}");
            assert_eq!(server.proxy.requests().len(), 1);
        }
    }
}

#[test]
fn missing_objects_are_named() {
    let root = tempfile::tempdir().unwrap();
    bucket(root.path(), 1, |_| 2);
    let bench = Bench::embedded(root.path());
    for url in [
        "s3://data/99999.tar",
        "s3://nowhere/0.tar",
        "/nowhere/0.tar",
    ] {
        let error = bench.error(sequential(urls(url)));
        assert!(
            matches!(error, StreamError::Source(SourceError::NotFound { .. })),
            "{error:?}"
        );
        assert!(
            error.to_string().contains(&format!("{url}: not found")),
            "{error}"
        );
    }
}

#[test]
fn unreachable_endpoint_is_given_up_soon() {
    let start = Instant::now();
    let bench = Bench::s3_at("http://127.0.0.1:9", 10);
    let text = bench.error(sequential(urls("s3://data/0.tar"))).to_string();
    assert!(
        text.contains("can't connect to http://127.0.0.1:9"),
        "{text}"
    );
    assert!(
        text.contains("refused") && text.contains("endpoint_url"),
        "{text}"
    );
    let text = bench
        .error(sequential(urls("http://127.0.0.1:9/0.tar")))
        .to_string();
    assert!(
        text.contains("can't connect") && text.contains("refused"),
        "{text}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// The outage is longer than the four attempts that a wrong address gets; shards opened meanwhile wait as well.
#[test]
fn server_outage_is_waited_for() {
    for kind in 0..2 {
        let server = Faulty::start(clean());
        for n in 0..4 {
            server.write(&format!("{n:05}.tar"), &shard(n, 9));
        }
        let bench = server.bench(10);
        let shards = urls(&server.both("{00000..00003}.tar")[kind]);
        let read = |n: usize| keys(&bench.all(sequential(shards[n..=n].to_vec())).unwrap());
        assert_eq!(read(0).len(), 9);
        server.proxy.away_for(Duration::from_millis(1500));
        assert_eq!((1..4).map(read).map(|keys| keys.len()).sum::<usize>(), 27);
        let retries = bench.sources.s3_server().counts().retries;
        assert!(kind == 1 || retries["connect"] >= 2, "{retries:?}");
    }
}

/// The shard is far larger than the read-ahead, so that the connection stays open and idle.
#[test]
fn slow_consumer_is_no_server_fault() {
    let members: Vec<_> = (0..60)
        .flat_map(|n| {
            let mut members = sample(0, n);
            // A second image is held, as the first.
            members.push((format!("00000{n:04}.webp"), noise(700_000)));
            members
        })
        .collect();
    let server = Faulty::start(clean());
    server.write("00000.tar", &tar_of(&members));
    for url in server.both("00000.tar") {
        for patience in [None, Some(Duration::from_millis(700))] {
            server
                .proxy
                .follow(Box::new(move |_, _| patience.map(Fault::Impatient)));
            // One counted fault would end the stream. The stall timeout is long, because the server reads the whole object
            // before it answers.
            let bench = Bench::new(S3Options {
                max_attempts: 1,
                stall_timeout: Duration::from_millis(1500),
                ..server.bench(1).sources.options().clone()
            });
            let mut config = sequential(urls(&url));
            config.batch_size = 1;
            let stream = bench.open(config).unwrap();
            let mut batches = take(&stream, &bench.metrics, 2).unwrap();
            std::thread::sleep(Duration::from_secs(3));
            batches.extend(take(&stream, &bench.metrics, usize::MAX).unwrap());
            assert_eq!(keys(&batches).len(), 60);
            let requests = server.proxy.requests().len();
            assert_eq!(requests > 1, patience.is_some(), "{requests}");
            let retries = bench.sources.s3_server().counts().retries;
            assert!(retries.keys().all(|reason| reason == "idle"), "{retries:?}");
        }
    }
}

#[test]
fn trickle_is_no_stall_above_minimum_rate() {
    let pause = Duration::from_millis(20);
    for (result, server, _) in over(&[Fault::Trickle(300, pause)], 1) {
        assert_eq!(result.unwrap(), whole());
        assert_eq!(server.proxy.requests().len(), 1);
    }
    // At 250 bytes a second the connection is replaced.
    let useless = Fault::Trickle(5, pause);
    for (result, server, bench) in over(std::slice::from_ref(&useless), 10) {
        assert_eq!(result.unwrap(), whole());
        assert_eq!(server.proxy.requests().len(), 2);
        if is_s3(&server) {
            assert_eq!(bench.sources.s3_server().counts().retries["too_slow"], 1);
        }
    }
    for (result, _, _) in over(&[useless.clone(), useless], 2) {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("gave up after 2 attempts"), "{text}");
        assert!(
            text.contains("only ") && text.contains(" bytes in "),
            "{text}"
        );
    }
}

#[test]
fn listing_is_retried() {
    let server = Faulty::start(script([
        Some(Fault::Status(503, "SlowDown")),
        Some(Fault::Hangup),
        Some(Fault::Reset(40)),
        Some(Fault::Stall(600)),
    ]));
    server.write("00000.tar", b"");
    let bench = server.bench(5);
    let listed = bench
        .runtime
        .block_on(bench.sources.list(&urls("s3://data/")));
    assert_eq!(listed.unwrap(), urls("s3://data/00000.tar"));
}
