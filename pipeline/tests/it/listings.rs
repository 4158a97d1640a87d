//! Listings whose pages don't fit together: an error with the prefix, never a part of the objects.

use std::time::{Duration, Instant};

use crate::support::Bench;
use crate::support::web::{Request, Response, Web};
use coffey_pipeline::{ShardUrl, SourceError};

/// The value of a query's key, undecoded.
fn query<'a>(request: &'a Request, key: &str) -> &'a str {
    let (_, query) = request.path.split_once('?').unwrap_or_default();
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .find(|(name, _)| *name == key)
        .map_or("", |(_, value)| value)
}

/// A page with `keys`, and `rest` before its end.
fn page(keys: impl IntoIterator<Item = impl AsRef<str>>, rest: &str) -> Response {
    let objects: String = keys
        .into_iter()
        .map(|key| {
            format!(
                "<Contents><Key>{}</Key><Size>1</Size></Contents>",
                key.as_ref()
            )
        })
        .collect();
    let xml = format!("<ListBucketResult><Name>b</Name>{objects}{rest}</ListBucketResult>");
    Response::new(200, xml).with("content-type", "application/xml")
}

fn more(token: &str) -> String {
    format!("<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>")
}

const END: &str = "<IsTruncated>false</IsTruncated>";

/// The listed shards of `s3://b/p/`, and the requests it took.
fn list(
    server: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> (Result<Vec<ShardUrl>, SourceError>, usize) {
    let web = Web::start(server);
    let bench = Bench::s3_at(&web.endpoint, 3);
    let url = "s3://b/p/".parse().unwrap();
    let listed = bench.runtime.block_on(bench.sources.list(&[url]));
    (listed, web.seen().len())
}

#[track_caller]
fn refused(fault: &str, server: impl Fn(&Request) -> Response + Send + Sync + 'static) -> usize {
    let (listed, requests) = list(server);
    let error = listed.unwrap_err();
    assert!(matches!(error, SourceError::Listing { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("s3://b/p/: the server's listing is wrong: "),
        "{text}"
    );
    assert!(
        text.contains(fault) && text.contains("name the shards"),
        "{text}"
    );
    requests
}

#[test]
fn listing_that_stops_short_is_refused() {
    let v1 = "<Marker/><IsTruncated>true</IsTruncated><NextMarker>p/1.tar</NextMarker>";
    let requests = refused("first 2 keys", move |_| page(["p/0.tar", "p/1.tar"], v1));
    assert_eq!(requests, 1);
    let empty = "<IsTruncated>true</IsTruncated><NextContinuationToken></NextContinuationToken>";
    refused("first 1 key is unknown", move |_| page(["p/0.tar"], empty));
    refused("KeyCount of 9", |_| {
        page(["p/0.tar"], &format!("<KeyCount>9</KeyCount>{END}"))
    });
    refused("without a key", |_| {
        page(
            ["p/0.tar"],
            &format!("<Contents><Size>1</Size></Contents>{END}"),
        )
    });
    refused("without a size", |_| {
        page(
            ["p/0.tar"],
            &format!("<Contents><Key>p/1.tar</Key></Contents>{END}"),
        )
    });
    refused("not under the prefix", |_| {
        page(["p/0.tar", "q/0.tar"], END)
    });
}

#[test]
fn listing_that_never_ends_is_refused() {
    // The same token for ever; the same page for ever under new tokens; a cycle of tokens.
    assert_eq!(
        refused("comes back", |_| page(["p/0.tar"], &more("same"))),
        2
    );
    let repeated = refused("no new one", |request| {
        let token = query(request, "continuation-token");
        page(["p/0.tar"], &more(&format!("{token}x")))
    });
    assert_eq!(repeated, 2);
    refused("comes back", |request| {
        match query(request, "continuation-token") {
            "" => page(["p/0.tar"], &more("a")),
            "a" => page(["p/1.tar"], &more("b")),
            _ => page(["p/2.tar"], &more("a")),
        }
    });
    let start = Instant::now();
    refused("are empty", |request| {
        let token = query(request, "continuation-token");
        let next = token.parse().unwrap_or(0) + 1;
        page([""; 0], &more(&next.to_string()))
    });
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn listing_in_any_order_gives_each_object_once() {
    let (listed, _) = list(|request| match query(request, "continuation-token") {
        "" => page(["p/3.tar", "p/1.tar"], &more("a")),
        "a" => page([""; 0], &more("b")),
        "b" => page(
            ["p/1.tar", "p/2.tar"],
            &format!("<KeyCount>0</KeyCount>{}", more("c")),
        ),
        // A token after the last page means nothing.
        _ => page(
            ["p/0.tar"],
            &format!("{END}<NextContinuationToken>d</NextContinuationToken>"),
        ),
    });
    let listed: Vec<_> = listed.unwrap().iter().map(ToString::to_string).collect();
    let expected = [
        "s3://b/p/0.tar",
        "s3://b/p/1.tar",
        "s3://b/p/2.tar",
        "s3://b/p/3.tar",
    ];
    assert_eq!(listed, expected);
}

#[test]
fn error_in_a_successful_response_is_an_error() {
    let (listed, requests) = list(|_| {
        let body = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
        Response::new(200, body)
    });
    let text = listed.unwrap_err().to_string();
    assert!(
        text.starts_with("s3://b/p/: ") && !text.contains("Response {"),
        "{text}"
    );
    assert_eq!(requests, 1, "{text}");
    let (listed, requests) = list(|_| Response::new(200, "<html>please log in</html>"));
    let text = listed.unwrap_err().to_string();
    assert!(
        text.contains("ListObjectsV2") && !text.contains("Response {"),
        "{text}"
    );
    assert_eq!(requests, 1, "{text}");
}

/// A listing of incomplete uploads, with `rest` before its end.
fn uploads(ids: &[&str], rest: &str) -> Response {
    let uploads: String = ids
        .iter()
        .map(|id| format!("<Upload><Key>p/{id}</Key><UploadId>{id}</UploadId></Upload>"))
        .collect();
    let xml = format!("<ListMultipartUploadsResult>{uploads}{rest}</ListMultipartUploadsResult>");
    Response::new(200, xml).with("content-type", "application/xml")
}

/// Aborts the incomplete uploads below `s3://b/p/`; returns the result and the aborted ids.
fn abort(
    server: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> (Result<usize, SourceError>, Vec<String>) {
    let web = Web::start(move |request| match request.method.as_str() {
        "DELETE" => Response::new(204, ""),
        _ => server(request),
    });
    let bench = Bench::s3_at(&web.endpoint, 3);
    let place = bench
        .sources
        .destination("s3://b/p/", bench.runtime.handle());
    let aborted = place.unwrap().abort_incomplete_uploads(|_| true);
    let seen = web.seen();
    let deleted = seen.iter().filter(|request| request.method == "DELETE");
    (
        aborted,
        deleted
            .map(|request| query(request, "uploadId").to_owned())
            .collect(),
    )
}

#[test]
fn listing_of_uploads_is_followed_to_its_end() {
    let (aborted, ids) = abort(|request| match query(request, "key-marker") {
        "" => uploads(
            &["1", "2"],
            "<IsTruncated>true</IsTruncated><NextKeyMarker>p/2</NextKeyMarker><NextUploadIdMarker>2</NextUploadIdMarker>",
        ),
        // Without an id, and with an upload of the page before.
        "p%2F2" => uploads(
            &["2", "3"],
            "<IsTruncated>true</IsTruncated><NextKeyMarker>p/3</NextKeyMarker>",
        ),
        _ => uploads(&["4"], END),
    });
    assert_eq!(aborted.unwrap(), 4);
    assert_eq!(ids, ["1", "2", "3", "4"]);
}

#[test]
fn listing_of_uploads_that_is_wrong_is_refused() {
    let same = "<IsTruncated>true</IsTruncated><NextKeyMarker>p/1</NextKeyMarker><NextUploadIdMarker>1</NextUploadIdMarker>";
    for (rest, fault) in [
        ("<IsTruncated>true</IsTruncated>", "no NextKeyMarker"),
        (same, "comes back"),
        (
            "<Upload><Key>p/x</Key></Upload><IsTruncated>false</IsTruncated>",
            "without a key or an id",
        ),
    ] {
        let (aborted, _) = abort(move |_| uploads(&["1"], rest));
        let error = aborted.unwrap_err();
        assert!(matches!(error, SourceError::Listing { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.starts_with("s3://b/p/: ") && text.contains(fault),
            "{text}"
        );
        assert!(text.contains("lifecycle rule"), "{text}");
    }
}
