//! Responses that are too long to be read whole.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::support::Bench;
use crate::support::web::{Response, Web};
use coffey_pipeline::{HubOptions, S3Options, ShardUrl, SourceError, SourceOptions};

const MIB: usize = 1 << 20;

fn list(bench: &Bench, url: &str) -> SourceError {
    let url: ShardUrl = url.parse().unwrap();
    let listed = bench.runtime.block_on(bench.sources.list(&[url]));
    listed.unwrap_err()
}

fn patterns(bench: &Bench, pattern: String) -> String {
    let shards = bench
        .runtime
        .block_on(bench.sources.shards(&[pattern.into()]));
    shards.unwrap_err().to_string()
}

/// A server that sends `head`, and then `piece` until the client closes the connection. Returns its address.
fn endless(head: &'static str, piece: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let piece = piece.clone();
            std::thread::spawn(move || {
                let mut request = [0; 4096];
                let length = socket.read(&mut request).unwrap();
                assert!(request[..length].starts_with(b"GET "));
                socket.write_all(head.as_bytes()).unwrap();
                while socket.write_all(&piece).is_ok() {}
            });
        }
    });
    endpoint
}

#[test]
fn long_list_of_shards_is_refused() {
    let web = Web::start(|_| Response {
        length: Some(1 << 30),
        ..Response::new(200, "s3://b/0.tar\n")
    });
    let bench = Bench::new(S3Options::default());
    let text = patterns(&bench, format!("@{}/list", web.endpoint));
    let expected = format!(
        "@{}/list: the list of shards has 1073741824 bytes; at most 268435456 are read",
        web.endpoint
    );
    assert_eq!(text, expected);
    let lines = b"s3://bucket/00000.tar\n".repeat(50_000);
    let endpoint = endless("HTTP/1.1 200 OK\r\n\r\n", lines);
    let text = patterns(&bench, format!("@{endpoint}/list"));
    assert!(text.contains("has more than 268435456 bytes"), "{text}");
}

#[test]
fn long_page_of_a_listing_is_refused() {
    let piece = b"<Contents><Key>p/0.tar</Key><Size>1</Size></Contents>".repeat(1000);
    let endpoint = endless("HTTP/1.1 200 OK\r\n\r\n<ListBucketResult>", piece);
    let error = list(&Bench::s3_at(&endpoint, 3), "s3://b/p/");
    assert_eq!(
        error.to_string(),
        "s3://b/p/: ListObjectsV2 has more than 16777216 bytes; at most 16777216 are read"
    );
    let piece = br#"{"type": "file", "path": "0.tar"},"#.repeat(1000);
    let endpoint = endless("HTTP/1.1 200 OK\r\n\r\n[", piece);
    let hub = Bench::new(SourceOptions {
        hub: HubOptions {
            endpoint: Ok(endpoint),
            ..HubOptions::default()
        },
        ..S3Options::default().into()
    });
    let text = list(&hub, "hf://datasets/u/n/").to_string();
    assert!(
        text.starts_with("hf://datasets/u/n/: a page of the Hub's listing has more than 16777216"),
        "{text}"
    );
}

#[test]
fn long_error_keeps_its_status_and_code() {
    let body = "<Error><Code>AccessDenied</Code><Message>from the test</Message>".to_owned()
        + &" ".repeat(10 * MIB);
    let web = Web::start(move |_| Response::new(403, body.clone()));
    let denied = |error: SourceError| {
        assert!(matches!(error, SourceError::Forbidden { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("AccessDenied from the test"), "{text}");
    };
    let bench = Bench::s3_at(&web.endpoint, 3);
    denied(list(&bench, "s3://b/p/"));
    denied(bench.read("s3://b/0.tar").unwrap_err());
    denied(bench.read(&format!("{}/0.tar", web.endpoint)).unwrap_err());
}

#[test]
fn endless_error_ends() {
    let start = Instant::now();
    let endpoint = endless("HTTP/1.1 404 Not Found\r\n\r\n", vec![b' '; MIB]);
    let bench = Bench::s3_at(&endpoint, 2);
    for url in ["s3://b/0.tar".to_owned(), format!("{endpoint}/0.tar")] {
        let error = bench.read(&url).unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(10));
}
