//! The requests that read: an object, and a listing.

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::primitives::DateTime;

use super::client::S3;
use super::error::Operation;
use crate::net::{
    Body, Condition, GetResult, RequestFailure, RetryBudget, RetryOptions, SourceError,
    content_range,
};
use crate::shard::ShardUrl;

/// An object in the listing of a bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectInfo {
    /// The object.
    pub url: ShardUrl,
    /// Its name below the listed folder.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// The version, where the listing gives it; as [`ObjectReader::etag`](crate::source::ObjectReader::etag).
    pub etag: Option<String>,
    /// Time of the last change, where the listing gives it: seconds since 1970.
    pub modified: Option<f64>,
}

impl S3 {
    /// Requests an object from `offset` on; `None` if the condition does not hold.
    pub(crate) async fn get(
        &self,
        url: &ShardUrl,
        bucket: &str,
        key: &str,
        offset: u64,
        condition: Condition<'_>,
    ) -> Result<Option<GetResult>, RequestFailure> {
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
                self.server.record_request("not_modified");
                return Ok(None);
            }
            Err(error) => {
                let operation = Operation::Read { offset };
                return Err(self.failure(url, &connection, &error, operation).await);
            }
        };
        self.server.record_request("ok");
        let length = output
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        let (start, total) = output
            .content_range()
            .and_then(content_range)
            .unwrap_or((0, length));
        Ok(Some(GetResult {
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
        let mut budget = RetryBudget::new(url.redacted(), options, self.server.clone());
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
                    self.server.record_request("ok");
                    budget.record_response();
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
                    let operation = Operation::Read { offset: 0 };
                    self.failure(url, &connection, &error, operation).await
                }
                Err(_) => RequestFailure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", stall_timeout.as_secs_f64()),
                },
            };
            budget.backoff(failure, 0).await?;
        }
    }
}

fn is_unmodified<E>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(error, SdkError::ServiceError(service) if service.raw().status().as_u16() == 304)
}
