//! What a server's refusal means, and what to say of it.

use crate::shard::ShardUrl;
use crate::source::error::SourceError;
use crate::source::retry::Failure;

/// The outcome of a request whose credentials were good once.
pub(super) const EXPIRED: &str = "expired";

pub(super) fn passing(reason: &'static str, cause: String) -> Failure {
    Failure::Passing { reason, cause }
}

/// What was asked for when the server refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    /// Reading an object, from this byte on.
    Reading(u64),
    /// Writing, or removing what was written.
    Writing,
}

/// What a reader that is refused can set.
const MAY_READ: &str = "check the credentials and the bucket's policy, or set [s3] anonymous = true for a public bucket, \
                        [s3] requester_pays = true where the bucket asks for it";
/// What a writer needs.
const MAY_WRITE: &str = "check that the credentials may write there (s3:PutObject, s3:GetObject, s3:DeleteObject and \
                         s3:AbortMultipartUpload on the objects, s3:ListBucket on the bucket)";

/// An error the server sent.
pub(super) struct Answer<'a> {
    pub(super) status: u16,
    pub(super) code: &'a str,
    pub(super) message: &'a str,
    pub(super) region: Option<&'a str>,
}

impl Answer<'_> {
    /// The outcome for the metrics, and what it means.
    pub(super) fn failure(&self, url: &ShardUrl, doing: Doing) -> (&'static str, Failure) {
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
            (405 | 501, _) if doing == Doing::Writing => {
                let cause = format!("{cause}; this server takes no writes");
                (
                    "client_error",
                    Failure::Fatal(SourceError::Refused { url, cause }),
                )
            }
            (_, "SlowDown" | "ThrottlingException" | "TooManyRequests") | (429, _) => {
                ("throttled", passing("throttled", cause))
            }
            (_, "RequestTimeout" | "InternalError") | (500.., _) => {
                ("server_error", passing("server_error", cause))
            }
            // Where they come from there may be newer ones.
            (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => {
                (EXPIRED, passing("expired_credentials", cause))
            }
            (_, "RequestTimeTooSkewed") => (
                "forbidden",
                Failure::Fatal(SourceError::Forbidden {
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
                    Failure::Fatal(SourceError::WrongRegion { url, cause, right }),
                )
            }
            // The body did not arrive as it was sent.
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
                let hint = match (*code, doing) {
                    ("NoSuchBucket", _) => " of the bucket, [s3] endpoint_url and [s3] path_style",
                    ("NoSuchUpload", _) => ", and that no other process writes to the same place",
                    (_, Doing::Reading(_)) => " and the range in braces",
                    (_, Doing::Writing) => "",
                };
                (
                    "not_found",
                    Failure::Fatal(SourceError::NotFound { url, cause, hint }),
                )
            }
            (412 | 416, _) if matches!(doing, Doing::Reading(1..)) => {
                let offset = match doing {
                    Doing::Reading(offset) => offset,
                    Doing::Writing => 0,
                };
                (
                    "changed",
                    Failure::Fatal(SourceError::Changed { url, offset, cause }),
                )
            }
            (401 | 403, _) => {
                let hint = match doing {
                    Doing::Reading(_) => MAY_READ,
                    Doing::Writing => MAY_WRITE,
                };
                (
                    "forbidden",
                    Failure::Fatal(SourceError::Forbidden { url, cause, hint }),
                )
            }
            _ => (
                "client_error",
                Failure::Fatal(SourceError::Refused { url, cause }),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fatal(status: u16, code: &str, region: Option<&str>, offset: u64) -> SourceError {
        refusal(status, code, region, Doing::Reading(offset))
    }

    fn refusal(status: u16, code: &str, region: Option<&str>, doing: Doing) -> SourceError {
        let answer = Answer {
            status,
            code,
            message: "said the server",
            region,
        };
        match answer.failure(&"s3://b/k.tar".parse().unwrap(), doing).1 {
            Failure::Fatal(error) => error,
            other => panic!("{other:?}"),
        }
    }

    fn reason(status: u16, code: &str) -> &'static str {
        let answer = Answer {
            status,
            code,
            message: "",
            region: None,
        };
        match answer
            .failure(&"s3://b/k.tar".parse().unwrap(), Doing::Writing)
            .1
        {
            Failure::Passing { reason, .. } => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_say_what_to_set() {
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
    fn who_writes_is_told_what_writing_takes() {
        let writing = |status, code| refusal(status, code, None, Doing::Writing).to_string();
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
    fn faults_that_pass_are_retried() {
        assert_eq!(reason(503, "SlowDown"), "throttled");
        assert_eq!(reason(500, "InternalError"), "server_error");
        assert_eq!(reason(502, ""), "server_error");
        assert_eq!(reason(400, "RequestTimeout"), "server_error");
        assert_eq!(reason(403, "ExpiredToken"), "expired_credentials");
    }
}
