//! Answers of a server that no retry changes, and servers that lack a part of S3.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::child::Child;
use crate::support::Bench;
use crate::support::web::{Request, Response, Web};
use coffey_pipeline::SourceError;
use coffey_pipeline::destination::PartOptions;
use sha2::{Digest, Sha256};

fn s3_error(status: u16, code: &str, rest: &str) -> Response {
    Response::new(status, format!("<Error><Code>{code}</Code>{rest}</Error>"))
        .with("content-type", "application/xml")
}

/// The error of a read of `path`, which must come after one request.
fn refusal(path: &str, over_s3: bool, response: Response) -> SourceError {
    let web = Web::start(move |_| response.clone());
    let url = if over_s3 {
        format!("s3://{path}")
    } else {
        format!("{}/{path}", web.endpoint)
    };
    let error = Bench::s3_at(&web.endpoint, 5).read(&url).unwrap_err();
    assert_eq!(web.seen().len(), 1, "{error}");
    assert!(error.to_string().lines().count() <= 2, "{error}");
    error
}

#[test]
fn archived_objects_are_to_be_restored() {
    for (over_s3, status, code) in [
        (true, 403, "InvalidObjectState"),
        (false, 403, "InvalidObjectState"),
        (false, 409, "BlobArchived"),
    ] {
        let message = "<Message>not valid for the storage class</Message>";
        let error = refusal("b/k.tar", over_s3, s3_error(status, code, message));
        assert!(matches!(error, SourceError::Archived { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("k.tar: the object is archived (") && text.contains("HTTP"),
            "{text}"
        );
        assert!(
            text.contains(code) && text.contains("restore it first"),
            "{text}"
        );
        assert!(!text.contains("credentials"), "{text}");
    }
}

#[test]
fn expired_signed_urls_say_so() {
    let aws = "<Message>Request has expired</Message><X-Amz-Expires>60</X-Amz-Expires>";
    let azure = "<Message>Server failed to authenticate the request.</Message><AuthenticationErrorDetail>Signature not valid in \
                 the specified time frame: Start [a] - Expiry [b] - Current [c]</AuthenticationErrorDetail>";
    let google =
        "<Message>Invalid argument.</Message><Details>The provided token has expired.</Details>";
    for (status, code, rest) in [
        (403, "AccessDenied", aws),
        (403, "AuthenticationFailed", azure),
        (400, "ExpiredToken", google),
    ] {
        let error = refusal("k.tar?sig=SECRET", false, s3_error(status, code, rest));
        assert!(matches!(error, SourceError::ExpiredUrl { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("the signed URL has expired (HTTP"), "{text}");
        assert!(
            text.contains("make new signed URLs") && !text.contains("SECRET"),
            "{text}"
        );
    }
    let text = refusal(
        "k.tar",
        false,
        Response::new(401, r#"{"error":"token expired"}"#),
    )
    .to_string();
    assert!(
        text.contains("token expired") && text.contains("login"),
        "{text}"
    );
    let wrong = s3_error(403, "SignatureDoesNotMatch", "");
    let text = refusal("k.tar?sig=SECRET", false, wrong).to_string();
    assert!(
        text.contains("does not accept the URL's signature"),
        "{text}"
    );
}

#[test]
fn final_answers_are_not_retried() {
    for status in [400, 402, 405, 409, 451, 501, 505, 507, 511] {
        for over_s3 in [true, false] {
            let error = refusal("b/k.tar", over_s3, s3_error(status, "Nonsense", "")).to_string();
            assert!(error.contains(&format!("HTTP {status}")), "{error}");
        }
    }
}

#[test]
fn passing_answers_are_retried() {
    for status in [408, 425, 429, 500, 502, 503, 504, 522] {
        let asked = AtomicUsize::new(0);
        let web = Web::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => Response::new(status, "").with("retry-after", "0"),
            _ => Response::new(200, "object").with("etag", "\"1\""),
        });
        let bench = Bench::s3_at(&web.endpoint, 3);
        for url in ["s3://b/k".to_owned(), format!("{}/k", web.endpoint)] {
            assert_eq!(bench.read(&url).unwrap(), b"object", "{status} {url}");
        }
    }
}

/// A server that does not implement conditions and breaks off every first response. The version is `etag`.
fn without_conditions(etag: impl Fn(&Request) -> String + Send + Sync + 'static) -> Web {
    const OBJECT: &str = "0123456789";
    Web::start(move |request| {
        let conditional = request.headers.keys().any(|name| name.starts_with("if-"));
        if conditional {
            return s3_error(
                501,
                "NotImplemented",
                "<Message>A header you provided</Message>",
            );
        }
        let range = request.header("range");
        let (status, begin) = match range.trim_start_matches("bytes=").trim_end_matches('-') {
            "" => (200, 0),
            begin => (206, begin.parse().unwrap()),
        };
        let mut response = Response::new(status, &OBJECT[begin..]).with("etag", etag(request));
        if begin > 0 {
            let last = OBJECT.len() - 1;
            let range = format!("bytes {begin}-{last}/{}", OBJECT.len());
            response = response.with("content-range", range);
        } else {
            response.body.truncate(4);
        }
        response
    })
}

#[test]
fn server_without_conditions_is_read_and_compared() {
    let web = without_conditions(|_| "\"1\"".to_owned());
    for url in ["s3://b/k".to_owned(), format!("{}/k", web.endpoint)] {
        let before = web.seen().len();
        let bench = Bench::s3_at(&web.endpoint, 2);
        assert_eq!(bench.read(&url).unwrap(), b"0123456789");
        // The first, the conditional one, the one without a condition.
        assert_eq!(web.seen().len() - before, 3);
    }
    let web = without_conditions(|request| format!("\"{}\"", request.header("range").len()));
    for url in ["s3://b/k".to_owned(), format!("{}/k", web.endpoint)] {
        let error = Bench::s3_at(&web.endpoint, 2).read(&url).unwrap_err();
        assert!(
            matches!(error, SourceError::Changed { offset: 4, .. }),
            "{error:?}"
        );
    }
}

/// A server that takes writes, except with a header that speaks of checksums.
fn without_checksums(status: u16) -> Web {
    Web::start(move |request| {
        if request
            .headers
            .keys()
            .any(|name| name.contains("checksum") || name == "x-amz-trailer")
        {
            let message = "<Message>Header 'x-amz-checksum-crc32' not implemented</Message>";
            return s3_error(status, "NotImplemented", message);
        }
        if request.method == "PUT" {
            return Response::new(200, "").with("etag", "\"1\"");
        }
        let name = if request.path.contains("uploads") {
            "Initiate"
        } else {
            "Complete"
        };
        let body = "<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId><ETag>\"1\"</ETag>";
        Response::new(
            200,
            format!("<{name}MultipartUploadResult>{body}</{name}MultipartUploadResult>"),
        )
        .with("content-type", "application/xml")
    })
}

#[test]
fn server_without_checksums_takes_writes() {
    let web = without_checksums(501);
    let bench = Bench::s3_at(&web.endpoint, 2);
    let parts = PartOptions {
        bytes: 100,
        in_flight: 2,
    };
    let runtime = bench.runtime.handle();
    let place = bench.sources.destination_with("s3://b/run", runtime, parts);
    let place = place.unwrap();
    place.write("small", &[b'x'; 50]).unwrap();
    place.write("large", &[b'x'; 250]).unwrap();
    let parts = web.seen();
    let parts = parts
        .iter()
        .filter(|request| request.path.contains("partNumber"));
    assert_eq!(parts.count(), 3);
}

#[test]
fn writes_are_verified_by_signature_and_checksum_on_request() {
    let web = Web::start(|_| Response::new(200, "").with("etag", "\"1\""));
    let child = |web: &Web| {
        Child::writes("s3://b/run/", &web.endpoint)
            .set("AWS_ACCESS_KEY_ID", "GOOD")
            .set("AWS_SECRET_ACCESS_KEY", "secret")
    };
    let variable = "AWS_REQUEST_CHECKSUM_CALCULATION";
    assert_eq!(child(&web).run(), ["written"]);
    assert_eq!(
        child(&web).set(variable, "when_supported").run(),
        ["written"]
    );
    let by_profile = child(&web);
    let file = by_profile.home().join("config");
    std::fs::write(
        &file,
        "[default]\nrequest_checksum_calculation = WHEN_SUPPORTED\n",
    )
    .unwrap();
    assert_eq!(by_profile.set("AWS_CONFIG_FILE", &file).run(), ["written"]);
    let seen = web.seen();
    assert_eq!(seen.len(), 3);
    for (request, has_checksum) in seen.iter().zip([false, true, true]) {
        let hash: String = Sha256::digest(&request.body)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(request.header("x-amz-content-sha256"), hash);
        assert_ne!(request.header("authorization"), "");
        assert_eq!(
            !request.header("x-amz-checksum-crc32").is_empty(),
            has_checksum
        );
    }
    // A server that refuses the checksum, or asks for it.
    let refuse = without_checksums(501);
    let printed = child(&refuse).set(variable, "when_supported").run();
    assert!(
        printed[0].contains(&format!("{variable}=when_required")),
        "{printed:?}"
    );
    assert_eq!(refuse.seen().len(), 1);
    let ask = Web::start(|_| s3_error(400, "MissingContentMD5", "<Message>Content-MD5</Message>"));
    let printed = child(&ask).run();
    assert!(
        printed[0].contains(&format!("{variable}=when_supported")),
        "{printed:?}"
    );
    assert_eq!(ask.seen().len(), 1);
}
