//! The meaning of the server's errors, and the advice for them.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::net::{RequestFailure, SourceError, causes, certificate_error};
use crate::shard::ShardUrl;

/// The outcome of a request with expired credentials.
pub(super) const EXPIRED: &str = "expired";

pub(super) fn passing(reason: &'static str, cause: String) -> RequestFailure {
    RequestFailure::Passing { reason, cause }
}

/// The kind of request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// A read of an object from byte `offset` on, or of a listing.
    Read { offset: u64 },
    /// A write or a removal.
    Write,
}

/// Advice after a refused read.
const MAY_READ: &str = "check the credentials and the bucket's policy, or set [s3] anonymous = true for a public bucket, \
                        [s3] requester_pays = true where the bucket asks for it";
/// Advice after a refused write.
const MAY_WRITE: &str = "check that the credentials may write there (s3:PutObject, s3:GetObject, s3:DeleteObject and \
                         s3:AbortMultipartUpload on the objects, s3:ListBucket on the bucket)";

/// The meaning of an error of the SDK: the outcome for the metrics, and the failure. `endpoint` is the
/// server's address.
pub(super) fn meaning<E>(
    url: &ShardUrl,
    endpoint: &str,
    error: &SdkError<E, HttpResponse>,
    operation: Operation,
) -> (&'static str, RequestFailure)
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match error {
        SdkError::ServiceError(service) => {
            let response = S3ErrorResponse {
                status: service.raw().status().as_u16(),
                code: service.err().code().unwrap_or_default(),
                message: service.err().message().unwrap_or_default(),
                region: service.raw().headers().get("x-amz-bucket-region"),
            };
            response.failure(url, operation)
        }
        SdkError::TimeoutError(_) => ("timeout", passing("timeout", causes(error))),
        SdkError::ResponseError(_) => ("bad_response", passing("bad_response", causes(error))),
        SdkError::DispatchFailure(dispatch) => {
            let cause = causes(error);
            if let Some(error) = certificate_error(url, endpoint, &cause) {
                ("certificate", RequestFailure::Fatal(error))
            } else if dispatch.is_timeout() || dispatch.is_io() {
                let failure = RequestFailure::Connect {
                    cause,
                    endpoint: endpoint.to_owned(),
                    hint: " and [s3] endpoint_url",
                };
                ("connect", failure)
            } else if dispatch
                .as_connector_error()
                .is_some_and(|error| error.as_other().is_some())
            {
                // Such as a kept-alive connection that the server closes just as it is used again.
                ("bad_response", passing("bad_response", cause))
            } else {
                (
                    "client_error",
                    RequestFailure::Fatal(client_error(url, cause)),
                )
            }
        }
        other => (
            "client_error",
            RequestFailure::Fatal(client_error(url, causes(other))),
        ),
    }
}

/// The error for a request that could not be sent.
fn client_error(url: &ShardUrl, cause: String) -> SourceError {
    let url = url.redacted();
    let lower = cause.to_lowercase();
    if lower.contains("credential") || lower.contains("identity") {
        SourceError::Credentials { url, cause }
    } else {
        SourceError::Refused { url, cause }
    }
}

/// An error response of the server.
struct S3ErrorResponse<'a> {
    status: u16,
    code: &'a str,
    message: &'a str,
    region: Option<&'a str>,
}

impl S3ErrorResponse<'_> {
    /// The outcome for the metrics, and the failure.
    fn failure(&self, url: &ShardUrl, operation: Operation) -> (&'static str, RequestFailure) {
        let Self {
            status,
            code,
            message,
            ..
        } = self;
        let url = url.redacted();
        let cause = [&format!("HTTP {status}"), *code, *message]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(" ");
        match (status, *code) {
            (405 | 501, _) if operation == Operation::Write => {
                let cause = format!("{cause}; this server takes no writes");
                (
                    "client_error",
                    RequestFailure::Fatal(SourceError::Refused { url, cause }),
                )
            }
            (_, "SlowDown" | "ThrottlingException" | "TooManyRequests") | (429, _) => {
                ("throttled", passing("throttled", cause))
            }
            (_, "RequestTimeout" | "InternalError") | (500.., _) => {
                ("server_error", passing("server_error", cause))
            }
            // The provider may have newer credentials.
            (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => {
                (EXPIRED, passing("expired_credentials", cause))
            }
            (_, "RequestTimeTooSkewed") => (
                "forbidden",
                RequestFailure::Fatal(SourceError::Forbidden {
                    url,
                    cause,
                    hint: "set this machine's clock",
                }),
            ),
            (
                _,
                "PermanentRedirect"
                | "TemporaryRedirect"
                | "AuthorizationHeaderMalformed"
                | "IllegalLocationConstraintException",
            )
            | (301 | 307, _) => {
                let right = self.region.map(str::to_owned);
                (
                    "wrong_region",
                    RequestFailure::Fatal(SourceError::WrongRegion { url, cause, right }),
                )
            }
            // The body was damaged on the way.
            (
                _,
                "IncompleteBody"
                | "BadDigest"
                | "XAmzContentChecksumMismatch"
                | "XAmzContentSHA256Mismatch",
            ) => ("bad_body", passing("bad_body", cause)),
            // Another request for the same object is under way.
            (409, "OperationAborted" | "ConditionalRequestConflict") => {
                ("conflict", passing("conflict", cause))
            }
            (404, _) => {
                let hint = match (*code, operation) {
                    ("NoSuchBucket", _) => " of the bucket, [s3] endpoint_url and [s3] path_style",
                    ("NoSuchUpload", _) => ", and that no other process writes to the same place",
                    (_, Operation::Read { .. }) => " and the range in braces",
                    (_, Operation::Write) => "",
                };
                (
                    "not_found",
                    RequestFailure::Fatal(SourceError::NotFound { url, cause, hint }),
                )
            }
            (412 | 416, _) => match operation {
                Operation::Read {
                    offset: offset @ 1..,
                } => (
                    "changed",
                    RequestFailure::Fatal(SourceError::Changed { url, offset, cause }),
                ),
                _ => (
                    "client_error",
                    RequestFailure::Fatal(SourceError::Refused { url, cause }),
                ),
            },
            (401 | 403, _) => {
                let hint = match operation {
                    Operation::Read { .. } => MAY_READ,
                    Operation::Write => MAY_WRITE,
                };
                (
                    "forbidden",
                    RequestFailure::Fatal(SourceError::Forbidden { url, cause, hint }),
                )
            }
            _ => (
                "client_error",
                RequestFailure::Fatal(SourceError::Refused { url, cause }),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fatal(status: u16, code: &str, region: Option<&str>, offset: u64) -> SourceError {
        refusal(status, code, region, Operation::Read { offset })
    }

    fn refusal(status: u16, code: &str, region: Option<&str>, operation: Operation) -> SourceError {
        let response = S3ErrorResponse {
            status,
            code,
            message: "said the server",
            region,
        };
        match response
            .failure(&"s3://b/k.tar".parse().unwrap(), operation)
            .1
        {
            RequestFailure::Fatal(error) => error,
            other => panic!("{other:?}"),
        }
    }

    fn reason(status: u16, code: &str) -> &'static str {
        let response = S3ErrorResponse {
            status,
            code,
            message: "",
            region: None,
        };
        match response
            .failure(&"s3://b/k.tar".parse().unwrap(), Operation::Write)
            .1
        {
            RequestFailure::Passing { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn s3_error_names_the_setting() {
        let error = fatal(403, "AccessDenied", None, 0).to_string();
        assert!(
            error.contains("s3://b/k.tar: access denied (HTTP 403 AccessDenied said the server)"),
            "{error}"
        );
        assert!(error.contains("[s3] anonymous = true"), "{error}");
        let error = fatal(301, "PermanentRedirect", Some("eu-west-1"), 0).to_string();
        assert!(
            error.ends_with("set [s3] region = \"eu-west-1\""),
            "{error}"
        );
        assert!(matches!(
            fatal(404, "NoSuchKey", None, 0),
            SourceError::NotFound { .. }
        ));
        assert!(
            fatal(404, "NoSuchBucket", None, 0)
                .to_string()
                .contains("path_style")
        );
        assert!(matches!(
            fatal(412, "PreconditionFailed", None, 9),
            SourceError::Changed { offset: 9, .. }
        ));
        assert!(matches!(
            fatal(400, "InvalidRequest", None, 0),
            SourceError::Refused { .. }
        ));
    }

    #[test]
    fn s3_write_error_names_the_permissions() {
        let writing = |status, code| refusal(status, code, None, Operation::Write).to_string();
        let error = writing(403, "AccessDenied");
        assert!(error.contains("s3:PutObject"), "{error}");
        assert!(!error.contains("anonymous"), "{error}");
        let error = writing(501, "NotImplemented");
        assert!(error.contains("takes no writes"), "{error}");
        let error = writing(404, "NoSuchUpload");
        assert!(error.contains("no other process"), "{error}");
        let error = writing(404, "NoSuchBucket");
        assert!(error.contains("path_style"), "{error}");
        assert_eq!(reason(400, "BadDigest"), "bad_body");
        assert_eq!(reason(409, "OperationAborted"), "conflict");
    }

    #[test]
    fn s3_passing_faults_are_retried() {
        assert_eq!(reason(503, "SlowDown"), "throttled");
        assert_eq!(reason(500, "InternalError"), "server_error");
        assert_eq!(reason(502, ""), "server_error");
        assert_eq!(reason(400, "RequestTimeout"), "server_error");
        assert_eq!(reason(403, "ExpiredToken"), "expired_credentials");
    }
}
