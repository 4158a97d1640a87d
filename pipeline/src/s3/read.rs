//! The requests that read: an object, and a listing.

use std::collections::BTreeMap;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::primitives::DateTime;
use aws_sdk_s3::types::Object;

use super::client::S3;
use super::operation::Operation;
use super::paging::Paging;
use crate::net::{
    Body, Condition, GetResult, RequestFailure, RetryBudget, RetryOptions, SourceError,
    content_range,
};
use crate::plural::counted;
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
                let operation = Operation::Get { offset };
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

    /// The objects under a prefix, by key.
    pub(crate) async fn objects(
        &self,
        url: &ShardUrl,
        bucket: &str,
        prefix: &str,
        options: RetryOptions,
    ) -> Result<Vec<ObjectInfo>, SourceError> {
        let mut budget = RetryBudget::new(url.to_string(), options, self.server.clone());
        let mut listing = Listing::new(bucket, prefix);
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
                    let next = listing.add(&page).map_err(|cause| SourceError::Listing {
                        url: url.to_string(),
                        cause,
                        hint: WITHOUT_LISTING,
                    })?;
                    match next {
                        Some(next) => token = Some(next),
                        None => return Ok(listing.found.into_values().collect()),
                    }
                    continue;
                }
                Ok(Err(error)) => {
                    self.failure(url, &connection, &error, Operation::List)
                        .await
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

/// Advice after a wrong listing.
const WITHOUT_LISTING: &str = "name the shards instead of their prefix (s3://bucket/{00000..00099}.tar or @FILE), copy a model to a \
     folder, or use a server that lists as S3 does";

/// The objects under a prefix, from the pages so far.
struct Listing<'a> {
    bucket: &'a str,
    prefix: &'a str,
    /// By key: an object on two pages counts once.
    found: BTreeMap<String, ObjectInfo>,
    paging: Paging,
}

impl<'a> Listing<'a> {
    fn new(bucket: &'a str, prefix: &'a str) -> Self {
        Self {
            bucket,
            prefix,
            found: BTreeMap::new(),
            paging: Paging::default(),
        }
    }

    /// Adds a page and returns the token of the next one; `None` after the last.
    ///
    /// # Errors
    /// The fault, if objects are or may be missing.
    fn add(&mut self, page: &ListObjectsV2Output) -> Result<Option<String>, String> {
        let (sent, before) = (page.contents().len(), self.found.len());
        let key_count = page
            .key_count()
            .and_then(|count| usize::try_from(count).ok());
        if let Some(key_count) = key_count.filter(|count| *count > sent) {
            return Err(format!(
                "a page has {} and a KeyCount of {key_count}",
                counted(sent, "key")
            ));
        }
        for object in page.contents() {
            let (key, info) = self.object(object)?;
            self.paging.count(&key)?;
            self.found.insert(key, info);
        }
        let token = page
            .next_continuation_token()
            .filter(|token| !token.is_empty());
        match (page.is_truncated(), token) {
            (Some(false), _) | (None, None) => Ok(None),
            (Some(true), None) => Err(format!(
                "a page is truncated (IsTruncated) and has no NextContinuationToken: what follows the first {} is unknown",
                counted(self.found.len(), "key")
            )),
            (_, Some(token)) => {
                let new = self.found.len() - before;
                self.paging.advance(token.to_owned(), sent, new)?;
                Ok(Some(token.to_owned()))
            }
        }
    }

    fn object(&self, object: &Object) -> Result<(String, ObjectInfo), String> {
        let key = object.key().ok_or("it has an object without a key")?;
        let name = key
            .strip_prefix(self.prefix)
            .ok_or_else(|| format!("it has {key:?}, which is not under the prefix"))?;
        let size = object.size().and_then(|size| u64::try_from(size).ok());
        let size = size.ok_or_else(|| format!("it has {key:?} without a size"))?;
        let info = ObjectInfo {
            url: ShardUrl::s3(self.bucket, key),
            name: name.to_owned(),
            size,
            etag: object.e_tag().map(str::to_owned),
            modified: object.last_modified().map(DateTime::as_secs_f64),
        };
        Ok((key.to_owned(), info))
    }
}

fn is_unmodified<E>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(error, SdkError::ServiceError(service) if service.raw().status().as_u16() == 304)
}
