//! The refusals of S3 servers and the advice for each.

use super::operation::Operation;
use super::refusal::S3Refusal;
use crate::net::{RequestFailure, ServerMessage, SourceError};

const GET: Operation = Operation::Get { offset: 0 };

fn said(status: u16, code: &str) -> S3Refusal<'_> {
    S3Refusal {
        status,
        said: ServerMessage::new(code, "said the server"),
        ..S3Refusal::default()
    }
}

fn error(refusal: &S3Refusal<'_>, operation: Operation) -> SourceError {
    match refusal
        .meaning(&"s3://b/k.tar".parse().unwrap(), operation)
        .1
    {
        RequestFailure::Fatal(error) | RequestFailure::Unsupported(error) => error,
        other => panic!("{other:?}"),
    }
}

fn reason(status: u16, code: &str) -> &'static str {
    let url = "s3://b/k.tar".parse().unwrap();
    match said(status, code).meaning(&url, Operation::Put).1 {
        RequestFailure::Passing { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn s3_error_names_the_setting() {
    let text = |status, code| error(&said(status, code), GET).to_string();
    let denied = text(403, "AccessDenied");
    assert!(
        denied.contains(
            "s3://b/k.tar: access denied (GetObject: HTTP 403 AccessDenied said the server)"
        ),
        "{denied}"
    );
    assert!(denied.contains("[s3] anonymous = true"), "{denied}");
    assert!(text(404, "NoSuchKey").contains("range in braces"));
    assert!(text(404, "NoSuchBucket").contains("path_style"));
    for code in ["InvalidAccessKeyId", "SignatureDoesNotMatch"] {
        let wrong = text(403, code);
        assert!(
            wrong.contains("AWS_SECRET_ACCESS_KEY") && !wrong.contains("anonymous"),
            "{wrong}"
        );
    }
    assert!(text(403, "RequestTimeTooSkewed").contains("clock"));
    let archived = text(403, "InvalidObjectState");
    assert!(
        archived.contains("is archived (GetObject: HTTP 403")
            && archived.contains("restore it first"),
        "{archived}"
    );
    let listing = error(&said(403, "AccessDenied"), Operation::List).to_string();
    assert!(
        listing.contains("s3:ListBucket") && listing.contains("name the shards"),
        "{listing}"
    );
    assert!(matches!(
        error(
            &said(412, "PreconditionFailed"),
            Operation::Get { offset: 9 }
        ),
        SourceError::Changed { offset: 9, .. }
    ));
    assert_eq!(
        text(400, "InvalidRequest"),
        "s3://b/k.tar: GetObject: HTTP 400 InvalidRequest said the server"
    );
}

#[test]
fn wrong_region_is_named_from_every_place() {
    let expecting = "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'";
    for refusal in [
        S3Refusal {
            region: Some("eu-west-1"),
            ..said(301, "PermanentRedirect")
        },
        S3Refusal {
            region: Some("eu-west-1"),
            ..said(301, "")
        },
        S3Refusal {
            body: "<Error><Region>eu-west-1</Region></Error>",
            ..said(400, "AuthorizationHeaderMalformed")
        },
        S3Refusal {
            status: 400,
            said: ServerMessage::new("AuthorizationHeaderMalformed", expecting),
            ..S3Refusal::default()
        },
        S3Refusal {
            body: "<Error><Endpoint>b.s3.eu-west-1.amazonaws.com</Endpoint></Error>",
            ..said(301, "PermanentRedirect")
        },
        S3Refusal {
            body: "<Error><Endpoint>b.s3-eu-west-1.amazonaws.com</Endpoint></Error>",
            ..said(307, "TemporaryRedirect")
        },
    ] {
        let error = error(&refusal, GET).to_string();
        assert!(
            error.ends_with("set [s3] region = \"eu-west-1\""),
            "{error}"
        );
    }
    let bare = error(&said(301, "PermanentRedirect"), GET).to_string();
    assert!(bare.ends_with("set [s3] region"), "{bare}");
    let key = S3Refusal {
        said: ServerMessage::new(
            "AuthorizationHeaderMalformed",
            "a non-empty Access Key must be provided",
        ),
        ..said(400, "")
    };
    assert!(error(&key, GET).to_string().contains("AWS_ACCESS_KEY_ID"));
    let moved = S3Refusal {
        location: Some("https://store.example/b/k.tar?sig=x"),
        ..said(302, "")
    };
    let moved = S3Refusal {
        said: ServerMessage::default(),
        ..moved
    };
    let moved = error(&moved, GET).to_string();
    assert!(
        moved.contains("redirects to https://store.example\n  set [s3] endpoint_url"),
        "{moved}"
    );
}

#[test]
fn s3_write_error_names_the_permissions() {
    let writing = |status, code| error(&said(status, code), Operation::Put).to_string();
    let denied = writing(403, "AccessDenied");
    assert!(
        denied.contains("s3:PutObject") && !denied.contains("anonymous"),
        "{denied}"
    );
    assert!(writing(405, "MethodNotAllowed").contains("takes no writes"));
    assert!(writing(404, "NoSuchUpload").contains("no other process"));
    assert!(writing(404, "NoSuchBucket").contains("path_style"));
    let parts = error(&said(501, "NotImplemented"), Operation::BeginUpload).to_string();
    assert!(parts.contains("uploads in parts"), "{parts}");
}

#[test]
fn checksum_refusal_names_the_variable() {
    let refuse = |status, code, message, sends_checksums, operation| {
        let said = ServerMessage::new(code, message);
        let refusal = S3Refusal {
            status,
            said,
            sends_checksums,
            ..S3Refusal::default()
        };
        error(&refusal, operation).to_string()
    };
    let variable = "AWS_REQUEST_CHECKSUM_CALCULATION";
    for (status, code, message) in [
        (
            501,
            "NotImplemented",
            "Header 'x-amz-checksum-crc32' not implemented",
        ),
        (
            400,
            "InvalidArgument",
            "Unsupported header 'x-amz-checksum-crc32' received for this API call.",
        ),
        (
            501,
            "NotImplemented",
            "A header you provided implies functionality that is not implemented",
        ),
    ] {
        for operation in [Operation::Put, Operation::SendPart] {
            let text = refuse(status, code, message, true, operation);
            assert!(
                text.contains(&format!("{variable}=when_required")),
                "{text}"
            );
            assert!(!text.contains("takes no writes"), "{text}");
        }
    }
    for (code, message) in [
        (
            "MissingContentMD5",
            "Missing required header for this request: Content-MD5",
        ),
        (
            "InvalidRequest",
            "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters",
        ),
    ] {
        let text = refuse(400, code, message, false, Operation::Put);
        assert!(
            text.contains(&format!("{variable}=when_supported")),
            "{text}"
        );
    }
}

#[test]
fn s3_passing_faults_are_retried() {
    for (status, code, expected) in [
        (503, "SlowDown", "throttled"),
        (403, "RequestThrottled", "throttled"),
        (500, "InternalError", "server_error"),
        (200, "InternalError", "server_error"),
        (502, "", "server_error"),
        (400, "RequestTimeout", "server_error"),
        (403, "ExpiredToken", "expired_credentials"),
        (400, "BadDigest", "bad_body"),
        (409, "OperationAborted", "conflict"),
    ] {
        assert_eq!(reason(status, code), expected, "{status} {code}");
    }
}

#[test]
fn s3_final_refusals_are_not_retried() {
    for (status, code) in [
        (400, "EntityTooLarge"),
        (400, "InvalidArgument"),
        (400, "InvalidBucketName"),
        (400, "KeyTooLongError"),
        (403, "AccountProblem"),
        (403, "AllAccessDisabled"),
        (403, "InvalidObjectState"),
        (405, "MethodNotAllowed"),
        (409, "BucketNotEmpty"),
        (409, "InvalidBucketState"),
        (411, "MissingContentLength"),
        (416, "InvalidRange"),
        (500, "NotImplemented"),
        (501, "NotImplemented"),
        (501, ""),
        (505, ""),
        (507, "XMinioStorageFull"),
    ] {
        for operation in [GET, Operation::Put, Operation::List] {
            error(&said(status, code), operation);
        }
    }
}
