//! S3 through the AWS SDK: one request at a time; repeating them is the caller's.

mod answer;
mod connect;
mod write;

pub(crate) use write::{Sent, Target};

use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::RequestPayer;

use super::error::{SourceError, causes};
use super::remote::{Body, Condition, Part};
use super::retry::{Budget, Failure, Met, RetryOptions};
use super::tls::{self, CaBundle};
use super::{ObjectInfo, S3Options};
use crate::flow::FlowMetrics;
use crate::shard::ShardUrl;

use answer::{Answer, Doing, EXPIRED, passing};
use connect::{Chain, Connection};

/// A client and what it was made from.
#[derive(Debug)]
pub(crate) struct S3 {
    chain: Chain,
    connection: Mutex<Arc<Connection>>,
    renewing: tokio::sync::Mutex<()>,
    met: Met,
    metrics: FlowMetrics,
}

impl S3 {
    /// Finds region and credentials and makes the client; `embedded` is our own server's address.
    pub(crate) async fn connect(
        options: &S3Options,
        embedded: Option<&str>,
        ca_bundle: Option<CaBundle>,
        metrics: FlowMetrics,
    ) -> Self {
        let chain = Chain::new(options, embedded, ca_bundle);
        Self {
            connection: Mutex::new(Arc::new(chain.connect().await)),
            renewing: tokio::sync::Mutex::new(()),
            met: Met::default(),
            metrics,
            chain,
        }
    }

    fn connection(&self) -> Arc<Connection> {
        let connection = self.connection.lock();
        Arc::clone(&connection.unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the server has answered yet.
    pub(crate) fn met(&self) -> Met {
        self.met.clone()
    }

    /// Who is asked, for messages and for telling one server's objects from another's.
    pub(crate) fn endpoint(&self) -> &str {
        &self.chain.endpoint
    }

    /// What to do after the server called the credentials of `used` expired.
    ///
    /// Those that carry an end of their own are renewed by their provider, in its time: that is worth
    /// waiting for. Of the others there may be newer ones in a file that was rewritten since.
    async fn renew(&self, url: &ShardUrl, used: &Arc<Connection>, failure: Failure) -> Failure {
        let _one_at_a_time = self.renewing.lock().await;
        if !Arc::ptr_eq(&self.connection(), used) {
            return failure;
        }
        let fresh = self.chain.connect().await;
        let before = {
            let given = used.given.lock();
            given.unwrap_or_else(PoisonError::into_inner).clone()
        };
        let (Some(before), Some(after)) = (before, fresh.credentials().await) else {
            return failure;
        };
        if before == after && after.expiry().is_none() {
            let cause = match failure {
                Failure::Passing { cause, .. } => cause,
                other => return other,
            };
            return Failure::Fatal(SourceError::Expired {
                url: url.redacted(),
                cause,
            });
        }
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *connection = Arc::new(fresh);
        failure
    }

    fn payer(&self) -> Option<RequestPayer> {
        self.chain
            .options
            .requester_pays
            .then_some(RequestPayer::Requester)
    }

    /// Requests an object from `offset` on; `None` if the condition does not hold.
    pub(crate) async fn get(
        &self,
        url: &ShardUrl,
        bucket: &str,
        key: &str,
        offset: u64,
        condition: Condition<'_>,
    ) -> Result<Option<Part>, Failure> {
        let connection = self.connection();
        let mut request = connection
            .client
            .get_object()
            .bucket(bucket)
            .key(key)
            .set_request_payer(self.payer());
        request = match condition {
            Condition::None => request,
            Condition::Is(version) => request.if_match(version),
            Condition::IsNot(version) => request.if_none_match(version),
        };
        if offset > 0 {
            request = request.range(format!("bytes={offset}-"));
        }
        let output = match request.send().await {
            Ok(output) => output,
            Err(error) if is_unmodified(&error) => {
                self.metrics.s3_request("not_modified");
                return Ok(None);
            }
            Err(error) => {
                return Err(self
                    .failed(url, &connection, &error, Doing::Reading(offset))
                    .await);
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
        Ok(Some(Part {
            start,
            total,
            version: output.e_tag().map(str::to_owned),
            body: Body::S3(output.body),
        }))
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
            let connection = self.connection();
            let request = connection
                .client
                .list_objects_v2()
                .bucket(bucket)
                .prefix(prefix)
                .set_request_payer(self.payer())
                .set_continuation_token(token.clone());
            let stall_timeout = self.chain.options.stall_timeout;
            let failure = match tokio::time::timeout(stall_timeout, request.send()).await {
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
                Ok(Err(error)) => {
                    self.failed(url, &connection, &error, Doing::Reading(0))
                        .await
                }
                Err(_) => Failure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", stall_timeout.as_secs_f64()),
                },
            };
            budget.failed(failure, 0).await?;
        }
    }

    /// What an SDK error means, and counts it; looks for newer credentials if that is what it takes.
    async fn failed<E>(
        &self,
        url: &ShardUrl,
        used: &Arc<Connection>,
        error: &SdkError<E, HttpResponse>,
        doing: Doing,
    ) -> Failure
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let (outcome, failure) = self.meaning(url, error, doing);
        self.metrics.s3_request(outcome);
        match outcome {
            EXPIRED => self.renew(url, used, failure).await,
            _ => failure,
        }
    }

    fn meaning<E>(
        &self,
        url: &ShardUrl,
        error: &SdkError<E, HttpResponse>,
        doing: Doing,
    ) -> (&'static str, Failure)
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        match error {
            SdkError::ServiceError(service) => {
                let answer = Answer {
                    status: service.raw().status().as_u16(),
                    code: service.err().code().unwrap_or_default(),
                    message: service.err().message().unwrap_or_default(),
                    region: service.raw().headers().get("x-amz-bucket-region"),
                };
                answer.failure(url, doing)
            }
            SdkError::TimeoutError(_) => ("timeout", passing("timeout", causes(error))),
            SdkError::ResponseError(_) => ("bad_response", passing("bad_response", causes(error))),
            SdkError::DispatchFailure(dispatch) => {
                let cause = causes(error);
                if let Some(error) = tls::refusal(url, self.endpoint(), &cause) {
                    ("certificate", Failure::Fatal(error))
                } else if dispatch.is_timeout() || dispatch.is_io() {
                    let failure = Failure::Connect {
                        cause,
                        endpoint: self.endpoint().to_owned(),
                        hint: " and [s3] endpoint_url",
                    };
                    ("connect", failure)
                } else if dispatch
                    .as_connector_error()
                    .is_some_and(|error| error.as_other().is_some())
                {
                    // As when the server closes a connection kept alive just as it is used again.
                    ("bad_response", passing("bad_response", cause))
                } else {
                    ("client_error", Failure::Fatal(client_error(url, cause)))
                }
            }
            other => (
                "client_error",
                Failure::Fatal(client_error(url, causes(other))),
            ),
        }
    }
}

/// A request that could not even be made.
fn client_error(url: &ShardUrl, cause: String) -> SourceError {
    let url = url.redacted();
    let lower = cause.to_lowercase();
    if lower.contains("credential") || lower.contains("identity") {
        SourceError::Credentials { url, cause }
    } else {
        SourceError::Refused { url, cause }
    }
}

fn is_unmodified<E>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(error, SdkError::ServiceError(service) if service.raw().status().as_u16() == 304)
}
