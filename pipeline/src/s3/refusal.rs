//! The meaning of the server's error responses, and the advice for them.

use super::operation::Operation;
use crate::net::{RequestFailure, ServerMessage, SourceError, element, is_passing, one_line};
use crate::shard::ShardUrl;

/// The label of a request in the metrics, and the failure.
pub(super) type Outcome = (&'static str, RequestFailure);

/// The outcome of a request with expired credentials.
pub(super) const EXPIRED: &str = "expired";

/// Codes of a server that asks for fewer requests.
const THROTTLED: [&str; 11] = [
    "BandwidthLimitExceeded",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "ServerBusy",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "ThrottlingException",
    "TooManyRequests",
];
/// Codes of a fault of the server that passes, whatever the status.
const PASSING: [&str; 7] = [
    "Busy",
    "InternalError",
    "InternalFailure",
    "OperationTimedOut",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
];
/// Codes of a body that was damaged on the way.
const BAD_BODY: [&str; 4] = [
    "BadDigest",
    "IncompleteBody",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
];
/// Codes of a bucket in another region.
const REDIRECTED: [&str; 4] = [
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
];
/// Codes of keys that the server does not accept.
const WRONG_KEYS: [&str; 6] = [
    "AuthorizationHeaderMalformed",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
];

/// Advice after refused keys.
const CHECK_KEYS: &str = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE), \
     and that they belong to the server of [s3] endpoint_url";
/// Advice for a server that does not support a checksum it was sent.
const NO_CHECKSUMS: &str = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, or request_checksum_calculation in the AWS profile, if \
     the server does not know the checksums of AWS";
/// Advice for a server that asks for a checksum.
const WITH_CHECKSUMS: &str = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_supported, or request_checksum_calculation in the AWS profile: the \
     server asks for a checksum";

pub(super) fn passing(reason: &'static str, cause: String) -> Outcome {
    (reason, RequestFailure::Passing { reason, cause })
}

fn fatal(outcome: &'static str, error: SourceError) -> Outcome {
    (outcome, RequestFailure::Fatal(error))
}

/// An error response of the server.
#[derive(Debug, Default)]
pub(super) struct S3Refusal<'a> {
    pub(super) status: u16,
    pub(super) said: ServerMessage,
    /// Header with the region of the bucket.
    pub(super) region: Option<&'a str>,
    /// Header with the target of a redirect.
    pub(super) location: Option<&'a str>,
    pub(super) body: &'a str,
    /// Whether the request had a checksum, where one is possible.
    pub(super) sends_checksums: bool,
}

impl S3Refusal<'_> {
    pub(super) fn meaning(&self, url: &ShardUrl, operation: Operation) -> Outcome {
        let (status, code) = (self.status, self.said.code.as_str());
        let url = url.redacted();
        let said = self.said.to_string();
        let cause = [format!("HTTP {status}"), said].join(" ").trim().to_owned();
        let refused = |advice: &str| {
            let cause = format!("{}: {cause}{advice}", operation.name());
            SourceError::Refused {
                url: url.clone(),
                cause,
            }
        };
        let forbidden = |hint| {
            let (url, cause) = (url.clone(), cause.clone());
            fatal("forbidden", SourceError::Forbidden { url, cause, hint })
        };
        if THROTTLED.contains(&code) || status == 429 {
            return passing("throttled", cause);
        }
        if PASSING.contains(&code) || (is_passing(status) && code != "NotImplemented") {
            return passing("server_error", cause);
        }
        if BAD_BODY.contains(&code) {
            return passing("bad_body", cause);
        }
        if let Some(advice) = self.checksum_advice(operation) {
            return fatal("client_error", refused(&format!("; {advice}")));
        }
        if let Some(outcome) = self.elsewhere(&url, &cause) {
            return outcome;
        }
        if self.said.is_archived() {
            return fatal("archived", SourceError::Archived { url, cause });
        }
        match (status, code) {
            // The provider may have newer credentials.
            (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => {
                let reason = "expired_credentials";
                (EXPIRED, RequestFailure::Passing { reason, cause })
            }
            (_, "RequestTimeTooSkewed" | "RequestExpired") => forbidden("set this machine's clock"),
            // Another request for the same object is under way.
            (409, "OperationAborted" | "ConditionalRequestConflict") => passing("conflict", cause),
            (404, _) => {
                let hint = match code {
                    "NoSuchBucket" => " of the bucket, [s3] endpoint_url and [s3] path_style",
                    "NoSuchUpload" => ", and that no other process writes to the same place",
                    _ if operation.is_write() => "",
                    _ => " and the range in braces",
                };
                fatal("not_found", SourceError::NotFound { url, cause, hint })
            }
            (412 | 416, _) if matches!(operation, Operation::Get { offset: 1.. }) => {
                let Operation::Get { offset } = operation else {
                    return fatal("client_error", refused(""));
                };
                fatal("changed", SourceError::Changed { url, offset, cause })
            }
            _ if WRONG_KEYS.contains(&code) => forbidden(CHECK_KEYS),
            (401 | 403, _) => forbidden(operation.access_advice()),
            (507, _) => fatal("client_error", refused("; free some space there")),
            (405, _) if operation.is_write() => {
                fatal("client_error", refused("; this server takes no writes"))
            }
            (400 | 405 | 501, _) | (_, "NotImplemented") => {
                let advice = self.support_advice(operation);
                let error = refused(&advice);
                ("client_error", RequestFailure::Unsupported(error))
            }
            _ => fatal("client_error", refused("")),
        }
    }

    /// Advice where the response speaks of checksums.
    fn checksum_advice(&self, operation: Operation) -> Option<&'static str> {
        let said = self.said.to_string().to_lowercase();
        let named = [
            "checksum",
            "content-md5",
            "contentmd5",
            "aws-chunked",
            "trailer",
        ]
        .iter()
        .any(|word| said.contains(word));
        if !operation.is_write() || !named || !matches!(self.status, 400 | 411 | 501) {
            return None;
        }
        Some(if self.sends_checksums {
            NO_CHECKSUMS
        } else {
            WITH_CHECKSUMS
        })
    }

    /// Advice where the server does not support a request.
    fn support_advice(&self, operation: Operation) -> String {
        let unsupported = self.status != 400 || self.said.code == "NotImplemented";
        if !unsupported {
            String::new()
        } else if operation.is_write() && self.sends_checksums {
            format!("; {NO_CHECKSUMS}")
        } else if operation.is_multipart() {
            "; the server does not support uploads in parts, which an output in S3 needs".to_owned()
        } else {
            "; the server does not support this request".to_owned()
        }
    }

    /// The failure of a request to the wrong region or to an address that redirects.
    fn elsewhere(&self, url: &str, cause: &str) -> Option<Outcome> {
        let code = self.said.code.as_str();
        let is_redirect = matches!(self.status, 301 | 302 | 307 | 308);
        if !is_redirect && !REDIRECTED.contains(&code) {
            return None;
        }
        let right = self.right_region();
        if is_redirect
            && code.is_empty()
            && right.is_none()
            && let Some(location) = self.location
        {
            // Without the object and the query.
            let server: Vec<_> = location.splitn(4, '/').take(3).collect();
            let cause = format!(
                "{cause}: the server redirects to {}; set [s3] endpoint_url to the address of the S3 server itself",
                one_line(&server.join("/"))
            );
            let url = url.to_owned();
            return Some(fatal("client_error", SourceError::Refused { url, cause }));
        }
        // The code is also that of a malformed key.
        if code == "AuthorizationHeaderMalformed"
            && right.is_none()
            && !self.said.message.contains("region")
        {
            return None;
        }
        let (url, cause) = (url.to_owned(), cause.to_owned());
        Some(fatal(
            "wrong_region",
            SourceError::WrongRegion { url, cause, right },
        ))
    }

    /// The region of the bucket, as far as the response gives it.
    fn right_region(&self) -> Option<String> {
        let named = self.region.map(str::to_owned);
        let named = named.or_else(|| element(self.body, "Region"));
        let expected = || {
            let (_, rest) = self.said.message.split_once("expecting '")?;
            Some(rest.split_once('\'')?.0.to_owned())
        };
        // Such as bucket.s3.eu-west-1.amazonaws.com, or bucket.s3-eu-west-1.amazonaws.com.
        let host = || {
            let endpoint = element(self.body, "Endpoint")?;
            let (host, _) = endpoint.split_once(".amazonaws.com")?;
            let (_, region) = host.rsplit_once("s3")?;
            let region = region.strip_prefix(['.', '-'])?;
            (!region.is_empty()).then(|| region.to_owned())
        };
        named.or_else(expected).or_else(host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            denied.contains("s3://b/k.tar: access denied (HTTP 403 AccessDenied said the server)"),
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
            archived.contains("is archived (HTTP 403") && archived.contains("restore it first"),
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
            moved.contains("redirects to https://store.example; set [s3] endpoint_url"),
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
}
