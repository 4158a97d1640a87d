//! S3 through the AWS SDK: one request at a time; repeating them is the caller's.

use std::time::Duration;

use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::SharedHttpClient;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{Credentials, ResponseChecksumValidation, StalledStreamProtectionConfig};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::RequestPayer;
use aws_smithy_http_client::tls;
use tokio::sync::RwLock;

use super::error::{SourceError, causes};
use super::remote::{Body, Part};
use super::retry::{Budget, Failure, Met, RetryOptions};
use super::{ObjectInfo, S3Options};
use crate::flow::FlowMetrics;
use crate::shard::ShardUrl;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_REGION: &str = "us-east-1";

/// A client and what it was made from.
#[derive(Debug)]
pub(crate) struct S3 {
    /// With the number of times it was made.
    client: RwLock<(u64, Client)>,
    options: S3Options,
    embedded: Option<String>,
    https: SharedHttpClient,
    met: Met,
    metrics: FlowMetrics,
}

impl S3 {
    /// Finds region and credentials and makes the client; `embedded` is our own server's address.
    pub(crate) async fn connect(
        options: &S3Options,
        embedded: Option<&str>,
        metrics: FlowMetrics,
    ) -> Self {
        let https = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(
                tls::rustls_provider::CryptoMode::Ring,
            ))
            .build_https();
        let client = Self::client(options, embedded, &https).await;
        Self {
            client: RwLock::new((0, client)),
            options: options.clone(),
            embedded: embedded.map(str::to_owned),
            https,
            met: Met::default(),
            metrics,
        }
    }

    async fn client(
        options: &S3Options,
        embedded: Option<&str>,
        https: &SharedHttpClient,
    ) -> Client {
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(https.clone());
        let endpoint = embedded.or(options.endpoint_url.as_deref());
        if let Some(endpoint) = endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        let environment = || {
            ["AWS_REGION", "AWS_DEFAULT_REGION"]
                .iter()
                .find_map(|name| std::env::var(name).ok())
        };
        let region = match (&options.region, embedded) {
            (Some(region), _) => Some(region.clone()),
            (None, Some(_)) => Some(DEFAULT_REGION.to_owned()),
            // A server of one's own has no use for a region; asking EC2 for one would take seconds.
            (None, None) if endpoint.is_some() || options.anonymous => {
                Some(environment().unwrap_or_else(|| DEFAULT_REGION.to_owned()))
            }
            (None, None) => None,
        };
        if let Some(region) = region {
            loader = loader.region(Region::new(region));
        }
        if embedded.is_some() {
            loader = loader.credentials_provider(Credentials::new(
                "embedded", "embedded", None, None, "embedded",
            ));
        } else if options.anonymous {
            loader = loader.no_credentials();
        }
        let shared = loader.load().await;
        let mut config = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(options.path_style || embedded.is_some())
            // Both are done here, over whole objects: the SDK's retries end where a body begins, and
            // its stall protection takes a slow consumer for a slow server.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .build(),
            )
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if shared.region().is_none() {
            config = config.region(Region::new(DEFAULT_REGION));
        }
        Client::from_conf(config.build())
    }

    /// Whether the server has answered yet.
    pub(crate) fn met(&self) -> Met {
        self.met.clone()
    }

    /// Looks the credentials up anew if those of the client made as `number` are too old: files and
    /// processes they come from are read only once by each client.
    async fn renew(&self, number: u64, failure: &Failure) {
        if !matches!(failure, Failure::Expired { .. }) {
            return;
        }
        let mut client = self.client.write().await;
        if client.0 == number {
            let new = Self::client(&self.options, self.embedded.as_deref(), &self.https).await;
            *client = (number + 1, new);
        }
    }

    fn payer(&self) -> Option<RequestPayer> {
        self.options
            .requester_pays
            .then_some(RequestPayer::Requester)
    }

    /// Requests an object from `offset` on; with a `version`, only that one.
    pub(crate) async fn get(
        &self,
        url: &ShardUrl,
        bucket: &str,
        key: &str,
        offset: u64,
        version: Option<&str>,
    ) -> Result<Part, Failure> {
        let (number, client) = self.client.read().await.clone();
        let mut request = client
            .get_object()
            .bucket(bucket)
            .key(key)
            .set_request_payer(self.payer())
            .set_if_match(version.map(str::to_owned));
        if offset > 0 {
            request = request.range(format!("bytes={offset}-"));
        }
        let output = match request.send().await {
            Ok(output) => output,
            Err(error) => {
                let failure = self.failure(url, &error, offset);
                self.renew(number, &failure).await;
                return Err(failure);
            }
        };
        self.metrics.s3_request("ok");
        let length = output
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        let (start, total) = match output.content_range().and_then(super::http::content_range) {
            Some((start, total)) => (start, total),
            None => (0, length),
        };
        Ok(Part {
            start,
            total,
            version: output.e_tag().map(str::to_owned),
            body: Body::S3(output.body),
        })
    }

    /// The objects under a prefix.
    pub(crate) async fn objects(
        &self,
        url: &ShardUrl,
        bucket: &str,
        prefix: &str,
        options: RetryOptions,
    ) -> Result<Vec<ObjectInfo>, SourceError> {
        let mut budget = Budget::new(
            url.redacted(),
            options,
            self.metrics.clone(),
            self.met(),
            true,
        );
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let (number, client) = self.client.read().await.clone();
            let request = client
                .list_objects_v2()
                .bucket(bucket)
                .prefix(prefix)
                .set_request_payer(self.payer())
                .set_continuation_token(token.clone());
            let failure = match tokio::time::timeout(options.stall_timeout, request.send()).await {
                Ok(Ok(page)) => {
                    self.metrics.s3_request("ok");
                    budget.contact();
                    found.extend(page.contents().iter().filter_map(|object| {
                        let key = object.key()?;
                        Some(ObjectInfo {
                            url: ShardUrl::s3(bucket, key),
                            name: key.strip_prefix(prefix).unwrap_or(key).to_owned(),
                            size: object.size().and_then(|n| u64::try_from(n).ok())?,
                            etag: object.e_tag().map(str::to_owned),
                            modified: object.last_modified().map(DateTime::as_secs_f64),
                        })
                    }));
                    match page.next_continuation_token() {
                        Some(next) if page.is_truncated() == Some(true) => {
                            token = Some(next.to_owned())
                        }
                        _ => return Ok(found),
                    }
                    continue;
                }
                Ok(Err(error)) => self.failure(url, &error, 0),
                Err(_) => Failure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", options.stall_timeout.as_secs_f64()),
                },
            };
            self.renew(number, &failure).await;
            budget.failed(failure, 0).await?;
        }
    }

    /// What an SDK error means, and counts it.
    fn failure<E>(&self, url: &ShardUrl, error: &SdkError<E, HttpResponse>, offset: u64) -> Failure
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let (outcome, failure) = match error {
            SdkError::ServiceError(service) => {
                let answer = Answer {
                    status: service.raw().status().as_u16(),
                    code: service.err().code().unwrap_or_default(),
                    message: service.err().message().unwrap_or_default(),
                    region: service.raw().headers().get("x-amz-bucket-region"),
                };
                answer.failure(url, offset)
            }
            SdkError::TimeoutError(_) => ("timeout", passing("timeout", causes(error))),
            SdkError::ResponseError(_) => ("bad_response", passing("bad_response", causes(error))),
            SdkError::DispatchFailure(dispatch) if dispatch.is_timeout() || dispatch.is_io() => {
                let endpoint = self
                    .embedded
                    .as_ref()
                    .or(self.options.endpoint_url.as_ref());
                let failure = Failure::Connect {
                    cause: causes(error),
                    endpoint: endpoint.map_or("AWS S3", String::as_str).to_owned(),
                    hint: " and [s3] endpoint_url",
                };
                ("connect", failure)
            }
            // As when the server closes a connection kept alive just as it is used again.
            SdkError::DispatchFailure(dispatch)
                if dispatch
                    .as_connector_error()
                    .is_some_and(|error| error.as_other().is_some()) =>
            {
                ("bad_response", passing("bad_response", causes(error)))
            }
            other => {
                let cause = causes(other);
                let lower = cause.to_lowercase();
                let error = if lower.contains("credential") || lower.contains("identity") {
                    SourceError::Credentials {
                        url: url.redacted(),
                        cause,
                    }
                } else {
                    SourceError::Refused {
                        url: url.redacted(),
                        cause,
                    }
                };
                ("client_error", Failure::Fatal(error))
            }
        };
        self.metrics.s3_request(outcome);
        failure
    }
}

fn passing(reason: &'static str, cause: String) -> Failure {
    Failure::Passing { reason, cause }
}

/// An error the server sent.
struct Answer<'a> {
    status: u16,
    code: &'a str,
    message: &'a str,
    region: Option<&'a str>,
}

impl Answer<'_> {
    fn failure(&self, url: &ShardUrl, offset: u64) -> (&'static str, Failure) {
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
            (_, "SlowDown" | "ThrottlingException" | "TooManyRequests") | (429, _) => {
                ("throttled", passing("throttled", cause))
            }
            (_, "RequestTimeout" | "InternalError") | (500.., _) => {
                ("server_error", passing("server_error", cause))
            }
            // By the next attempt there may be new ones.
            (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired") => {
                ("expired", Failure::Expired { cause })
            }
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
            (404, _) => {
                let hint = if *code == "NoSuchBucket" {
                    " of the bucket, [s3] endpoint_url and [s3] path_style"
                } else {
                    " and the range in braces"
                };
                (
                    "not_found",
                    Failure::Fatal(SourceError::NotFound { url, cause, hint }),
                )
            }
            (412 | 416, _) if offset > 0 => (
                "changed",
                Failure::Fatal(SourceError::Changed { url, offset, cause }),
            ),
            (401 | 403, _) => {
                let hint = "check the credentials and the bucket's policy, or set [s3] anonymous = true for a public bucket, \
                            [s3] requester_pays = true where the bucket asks for it";
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
        let answer = Answer {
            status,
            code,
            message: "said the server",
            region,
        };
        match answer.failure(&"s3://b/k.tar".parse().unwrap(), offset).1 {
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
        match answer.failure(&"s3://b/k.tar".parse().unwrap(), 0).1 {
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
    fn faults_that_pass_are_retried() {
        assert_eq!(reason(503, "SlowDown"), "throttled");
        assert_eq!(reason(500, "InternalError"), "server_error");
        assert_eq!(reason(502, ""), "server_error");
        assert_eq!(reason(400, "RequestTimeout"), "server_error");
    }
}
