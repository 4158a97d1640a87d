//! Shards are looked up before a run, whatever holds them.

use std::path::Path;
use std::time::Duration;

use crate::support::proxy::Fault;
use crate::support::web::{Request, Response, Web};
use crate::support::{Bench, Faulty, read_object, urls};
use coffey_pipeline::{HubOptions, LookUp, S3Options, ShardUrl, SourceError, SourceOptions};

/// Empty shards `00000.tar` … in the bucket `data`, without those of `gaps`.
fn shards(root: &Path, count: usize, gaps: &[usize]) {
    std::fs::create_dir_all(root.join("data/deep")).unwrap();
    for n in (0..count).filter(|n| !gaps.contains(n)) {
        std::fs::write(root.join(format!("data/{n:05}.tar")), b"x").unwrap();
        std::fs::write(root.join(format!("data/deep/{n:05}.json")), b"{}").unwrap();
    }
}

fn look_up(bench: &Bench, pattern: &str) -> Result<LookUp, SourceError> {
    let urls: Vec<ShardUrl> = urls(pattern);
    bench.runtime.block_on(bench.sources.look_up(&urls))
}

fn s3_requests(bench: &Bench) -> u64 {
    bench.sources.s3_server().counts().requests.values().sum()
}

#[test]
fn look_up_of_a_prefix_takes_one_listing() {
    let root = tempfile::tempdir().unwrap();
    shards(root.path(), 500, &[]);
    let bench = Bench::embedded(root.path());
    let found = look_up(&bench, "s3://data/{00000..00499}.tar").unwrap();
    assert_eq!((found.shards, found.unknown), (500, 0));
    assert_eq!(s3_requests(&bench), 1);
    // Twice the same shard, and standard input.
    let found = look_up(&bench, "s3://data/00000.tar::-::s3://data/00000.tar").unwrap();
    assert_eq!(found.shards, 1);
}

#[test]
fn look_up_of_thousands_is_parallel_pages() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("data")).unwrap();
    for n in (0..9000).filter(|n| *n != 4321) {
        std::fs::write(root.path().join(format!("data/{n:05}.tar")), b"").unwrap();
    }
    let bench = Bench::embedded(root.path());
    let error = look_up(&bench, "s3://data/{00000..08999}.tar")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("1 of 9000 shards") && error.contains("04321.tar"),
        "{error}"
    );
    assert!(s3_requests(&bench) < 40, "{}", s3_requests(&bench));
}

#[test]
fn look_up_names_every_missing_shard_at_once() {
    let root = tempfile::tempdir().unwrap();
    shards(root.path(), 60, &[3, 41]);
    let bench = Bench::embedded(root.path());
    let folder = root.path().join("data").display().to_string();
    let server = crate::support::server::serve(bench.runtime.handle(), root.path(), &[]);
    for place in [
        "s3://data".to_owned(),
        folder,
        format!("http://{server}/data"),
    ] {
        for range in ["{00000..00059}", "{00000..00003}"] {
            let error = look_up(&bench, &format!("{place}/{range}.tar")).unwrap_err();
            assert!(!error.is_config(), "{error}");
            let text = error.to_string();
            let first = format!("{place}/00003.tar not found (");
            assert!(text.contains(&first), "{text}");
            let both = range == "{00000..00059}";
            let count = if both {
                "2 of 60 shards"
            } else {
                "1 of 4 shards"
            };
            assert!(
                text.starts_with(count) && text.contains("check_shards"),
                "{text}"
            );
            assert_eq!(text.contains("/00041.tar not found"), both, "{text}");
        }
    }
    // One shard alone has its own error.
    let error = look_up(&bench, "s3://data/00003.tar").unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
}

#[test]
fn look_up_bounds_the_list_of_missing_shards() {
    let bench = Bench::new(S3Options::default());
    let text = look_up(&bench, "/nowhere/{00000..00099}.tar")
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("100 of 100 shards"), "{text}");
    assert_eq!(text.matches("not found").count(), 20);
    assert!(text.contains(" and 80 more\n  "), "{text}");
    let text = look_up(&bench, "/nowhere/{00000..04999}.tar")
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("at least 1000 of 5000 shards"), "{text}");
}

#[test]
fn look_up_is_not_fooled_by_a_listing() {
    let listing = |request: &Request| request.path.contains("list-type=2");
    let object = |request: &Request| match request.path.contains("/00007.tar") {
        true => Response::s3_error(404, "NoSuchKey"),
        false => Response::new(206, "x").with("content-range", "bytes 0-0/9"),
    };
    let empty = "<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>";
    for page in [
        Response::s3_error(403, "AccessDenied"),
        Response::s3_error(405, "MethodNotAllowed"),
        Response::s3_error(501, "NotImplemented"),
        Response::new(200, empty),
        Response::new(200, "<html>"),
    ] {
        let web = Web::start(move |request| match listing(request) {
            true => page.clone(),
            false => object(request),
        });
        let bench = Bench::s3_at(&web.endpoint, 3);
        assert_eq!(
            look_up(&bench, "s3://data/{00008..00030}.tar")
                .unwrap()
                .shards,
            23
        );
        let text = look_up(&bench, "s3://data/{00000..00030}.tar")
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("1 of 31 shards") && text.contains("00007.tar"),
            "{text}"
        );
    }
}

#[test]
fn look_up_asks_again_after_passing_faults() {
    let faulty = Faulty::start(Box::new(|_, nth| match nth {
        0 => Some(Fault::Status(503, "SlowDown")),
        1 => Some(Fault::Hangup),
        _ => None,
    }));
    for n in 0..20 {
        faulty.write(&format!("{n:05}.tar"), b"x");
    }
    let bench = faulty.bench(6);
    for url in faulty.both("{00000..00019}.tar") {
        assert_eq!(look_up(&bench, &url).unwrap().shards, 20);
    }
    // A server that is never there ends the look-up, and does so at once.
    drop(faulty);
    let gone = Bench::s3_at("http://127.0.0.1:9", 3);
    let error = look_up(&gone, "s3://data/{00000..00019}.tar").unwrap_err();
    assert!(
        matches!(error, SourceError::Unreachable { .. }),
        "{error:?}"
    );
}

#[test]
fn look_up_works_with_servers_that_refuse_head() {
    for status in [400, 403, 405, 500, 501] {
        let web =
            Web::start(
                move |request| match (request.method.as_str(), request.path.as_str()) {
                    ("HEAD", _) => Response {
                        body: Vec::new(),
                        ..Response::new(status, "")
                    },
                    (_, "/3.tar") => Response::new(404, "no"),
                    (_, "/empty.tar") => Response::new(416, ""),
                    _ if request.header("range") == "bytes=0-0" => {
                        Response::new(206, "x").with("content-range", "bytes 0-0/9")
                    }
                    _ => Response::new(500, "the whole shard was requested"),
                },
            );
        let bench = Bench::s3_at(&web.endpoint, 3);
        let at = |pattern: &str| format!("{}/{pattern}", web.endpoint);
        let text = look_up(&bench, &at("{0..5}.tar")).unwrap_err().to_string();
        assert!(
            text.starts_with("1 of 6 shards") && text.contains("/3.tar not found"),
            "{text}"
        );
        assert!(look_up(&bench, &at("{empty,1}.tar")).is_ok());
    }
    // A server that answers neither way says nothing of its shards.
    let web = Web::start(|_| Response::new(400, ""));
    let bench = Bench::s3_at(&web.endpoint, 3);
    let found = look_up(&bench, &format!("{}/{{0..4}}.tar", web.endpoint)).unwrap();
    assert_eq!((found.shards, found.unknown), (5, 5));
    // The signature of a URL is not in the message.
    let web = Web::start(|_| Response::new(403, ""));
    let bench = Bench::s3_at(&web.endpoint, 3);
    let text = look_up(&bench, &format!("{}/{{0..1}}.tar?sig=s3cret", web.endpoint)).unwrap_err();
    let text = text.to_string();
    assert!(
        text.contains("access denied (HTTP 403") && !text.contains("s3cret"),
        "{text}"
    );
}

/// A Hub with the dataset `u/n` of 30 shards without number 4, private to the token `hf_s3cret`. Shards are redirected to
/// `store`.
fn hub(store: &str, lists: bool) -> Web {
    let store = store.to_owned();
    Web::start(move |request| {
        if request.header("authorization") != "Bearer hf_s3cret" {
            return Response::new(401, "").with("x-error-message", "Invalid credentials");
        }
        let name = |path: &str| path.rsplit('/').next().unwrap().to_owned();
        if let Some(rest) = request
            .path
            .strip_prefix("/api/datasets/u/n/tree/v1/train?")
        {
            let page = |range: std::ops::Range<usize>| {
                let files = range
                    .filter(|n| *n != 4)
                    .map(|n| format!(r#"{{"type":"file","size":1,"path":"train/{n:05}.tar"}}"#));
                format!("[{}]", files.collect::<Vec<_>>().join(","))
            };
            return match (lists, rest.contains("cursor=2")) {
                (false, _) => Response::new(404, ""),
                (true, true) => Response::new(200, page(20..30)),
                (true, false) => {
                    let next =
                        format!("</api/datasets/u/n/tree/v1/train?{rest}&cursor=2>; rel=\"next\"");
                    Response::new(200, page(0..20)).with("link", next)
                }
            };
        }
        match request.path.strip_prefix("/datasets/u/n/resolve/v1/train/") {
            Some("00004.tar") | None => {
                Response::new(404, "").with("x-error-message", "Entry not found")
            }
            Some(path) => {
                Response::new(302, "").with("location", format!("{store}/{}", name(path)))
            }
        }
    })
}

fn on_hub(endpoint: &str, token: Option<&str>) -> Bench {
    Bench::new(SourceOptions {
        s3: S3Options {
            max_attempts: 3,
            stall_timeout: Duration::from_millis(500),
            ..S3Options::default()
        },
        hub: HubOptions {
            endpoint: Ok(endpoint.to_owned()),
            token: token.map(str::to_owned),
        },
        ..SourceOptions::default()
    })
}

#[test]
fn hub_shards_are_read_with_the_token_of_the_hub_alone() {
    let store = Web::start(|request| Response::new(200, request.path.clone()));
    let hub = hub(&store.endpoint, true);
    let bench = on_hub(&hub.endpoint, Some("hf_s3cret"));
    let read = |url: &str| bench.runtime.block_on(read_object(&bench.sources, url));
    assert_eq!(
        read("hf://datasets/u/n@v1/train/00001.tar").unwrap(),
        b"/00001.tar"
    );
    // The Hub's own address is the same place.
    let resolved = format!("{}/datasets/u/n/resolve/v1/train/00002.tar", hub.endpoint);
    assert_eq!(read(&resolved).unwrap(), b"/00002.tar");
    assert_eq!(store.seen().len(), 2);
    for request in store.seen() {
        assert_eq!(
            request.header("authorization"),
            "",
            "the token left the Hub"
        );
        assert_eq!(request.header("referer"), "");
    }
    let text = read("hf://datasets/u/n@v1/train/00004.tar")
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("hf://datasets/u/n@v1/train/00004.tar: not found (HTTP 404"),
        "{text}"
    );
    assert!(text.contains("Entry not found"), "{text}");
    let stranger = on_hub(&hub.endpoint, None);
    let read = read_object(&stranger.sources, "hf://datasets/u/n@v1/train/00001.tar");
    let text = stranger.runtime.block_on(read).unwrap_err().to_string();
    assert!(
        text.contains("Invalid credentials") && text.contains("HF_TOKEN"),
        "{text}"
    );
}

#[test]
fn hub_shards_are_looked_up_and_listed() {
    let store = Web::start(|_| Response::new(200, "x"));
    for lists in [true, false] {
        let hub = hub(&store.endpoint, lists);
        let bench = on_hub(&hub.endpoint, Some("hf_s3cret"));
        let found = look_up(&bench, "hf://datasets/u/n@v1/train/{00005..00029}.tar").unwrap();
        assert_eq!(found.shards, 25);
        if lists {
            assert_eq!(hub.seen().len(), 2, "two pages");
        }
        let error = look_up(&bench, "hf://datasets/u/n@v1/train/{00000..00029}.tar").unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("1 of 30 shards") && text.contains("00004.tar not found"),
            "{text}"
        );
    }
    let hub = hub(&store.endpoint, true);
    let bench = on_hub(&hub.endpoint, Some("hf_s3cret"));
    let folder = ["hf://datasets/u/n@v1/train/".into()];
    let list = bench
        .runtime
        .block_on(bench.sources.shards(&folder))
        .unwrap();
    assert_eq!(list.shards.len(), 29);
    assert_eq!(
        list.shards[0].to_string(),
        "hf://datasets/u/n@v1/train/00000.tar"
    );
    assert_eq!(list.unlisted().count(), 0);
}

#[test]
fn headers_are_not_sent_to_another_server() {
    let other = Web::start(|_| Response::new(200, "y"));
    let target = other.endpoint.clone();
    let own = Web::start(move |request| match request.path.as_str() {
        _ if request.header("authorization") != "Bearer s3cret" => Response::new(401, ""),
        "/away.tar" => Response::new(302, "").with("location", format!("{target}/a.tar")),
        "/moved.tar" => Response::new(301, "").with("location", "here.tar"),
        "/loop.tar" => Response::new(302, "").with("location", "/loop.tar"),
        _ => Response::new(200, "x"),
    });
    // The variable is this test's own: PATH is set everywhere, and is no secret.
    let value = std::env::var("CARGO_PKG_NAME").unwrap();
    assert!(!value.is_empty());
    let header = format!("{} X-Name: ${{CARGO_PKG_NAME}}", own.endpoint);
    let bench = Bench::new(SourceOptions {
        http_headers: vec![header.parse().unwrap()],
        // The Hub's token stands for an Authorization header.
        hub: HubOptions {
            endpoint: Ok(own.endpoint.clone()),
            token: Some("s3cret".to_owned()),
        },
        ..SourceOptions::default()
    });
    let read = |url: String| bench.runtime.block_on(read_object(&bench.sources, &url));
    assert_eq!(read(format!("{}/away.tar", own.endpoint)).unwrap(), b"y");
    assert_eq!(read(format!("{}/moved.tar", own.endpoint)).unwrap(), b"x");
    let text = read(format!("{}/loop.tar", own.endpoint))
        .unwrap_err()
        .to_string();
    assert!(text.contains("redirected more than 10 times"), "{text}");
    assert!(
        own.seen()
            .iter()
            .all(|request| request.header("x-name") == value)
    );
    let foreign = other.seen();
    assert_eq!(foreign.len(), 1);
    assert_eq!(foreign[0].header("x-name"), "");
    assert_eq!(foreign[0].header("authorization"), "");
}
