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
        let url = url.to_string();
        let cause = format!("{}: HTTP {status} {}", operation.name(), self.said);
        let cause = cause.trim_end().to_owned();
        let refused = |advice: &str| {
            let cause = format!("{cause}{advice}");
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
            return fatal("client_error", refused(&format!("\n  {advice}")));
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
            (507, _) => fatal("client_error", refused("\n  free some space there")),
            (405, _) if operation.is_write() => fatal(
                "client_error",
                refused("\n  this server takes no writes: name another place"),
            ),
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
            format!("\n  {NO_CHECKSUMS}")
        } else if operation.is_multipart() {
            "\n  the server does not support uploads in parts, which an output in S3 needs"
                .to_owned()
        } else {
            "\n  the server does not support this request".to_owned()
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
                "{cause}: the server redirects to {}\n  set [s3] endpoint_url to the address of the S3 server itself",
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
