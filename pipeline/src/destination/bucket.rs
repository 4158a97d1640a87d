//! A prefix in S3: requests with retries.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::OnceCell;

use super::{Entry, ObjectMeta, PartOptions};
use crate::net::{RequestFailure, RetryBudget, RetryOptions, SourceError};
use crate::s3::{
    ConditionalWrite, ObjectPath, Paging, S3, UploadMarker, WriteCondition, wrong_uploads,
};
use crate::shard::ShardUrl;
use crate::source::{ObjectReader, Sources};

/// Slowest accepted pace of an upload; below it the request counts as stalled. Bytes a second.
const LEAST_PACE: u64 = 128 << 10;
/// Attempts at aborting an upload: the abort must not delay the error that caused it.
const ABORT_ATTEMPTS: u32 = 3;
/// Attempts at a conditional write: what it compares with is soon out of date.
const CONDITIONAL_ATTEMPTS: u32 = 3;

pub(super) struct Bucket {
    sources: Sources,
    runtime: Handle,
    bucket: String,
    /// Ends with `/`, or is empty.
    prefix: String,
    pub(super) parts: PartOptions,
    s3: OnceCell<std::sync::Arc<S3>>,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bucket")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl Bucket {
    pub(super) fn new(
        sources: Sources,
        runtime: Handle,
        bucket: &str,
        prefix: &str,
        parts: PartOptions,
    ) -> Self {
        Self {
            sources,
            runtime,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            parts,
            s3: OnceCell::new(),
        }
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(super) fn target(&self, name: &str) -> ObjectPath {
        ObjectPath::new(&self.bucket, format!("{}{name}", self.prefix))
    }

    pub(super) async fn s3(&self) -> Result<&S3, SourceError> {
        let s3 = self.s3.get_or_try_init(|| self.sources.s3()).await?;
        Ok(s3)
    }

    /// Makes a request, with retries; `bytes` is the size of its body.
    pub(super) async fn retry<'a, T, F>(
        &'a self,
        url: &ShardUrl,
        bytes: usize,
        request: impl Fn(&'a S3) -> F + Send,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, RequestFailure>> + Send,
    {
        self.retry_at_most(u32::MAX, url, bytes, request).await
    }

    async fn retry_at_most<'a, T, F>(
        &'a self,
        attempts: u32,
        url: &ShardUrl,
        bytes: usize,
        request: impl Fn(&'a S3) -> F + Send,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, RequestFailure>> + Send,
    {
        let s3 = self.s3().await?;
        let options = self.sources.retry_options();
        let options = RetryOptions {
            max_attempts: options.max_attempts.min(attempts),
            ..options
        };
        let stall = self.sources.options().stall_timeout;
        let patience = stall + Duration::from_secs_f64(bytes as f64 / LEAST_PACE as f64);
        let mut budget = RetryBudget::new(url.to_string(), options, s3.server().clone());
        loop {
            let failure = match tokio::time::timeout(patience, request(s3)).await {
                Ok(Ok(answer)) => {
                    budget.record_response();
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => RequestFailure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", patience.as_secs_f64()),
                },
            };
            budget
                .backoff(failure, 0)
                .await
                .map_err(|error| match error {
                    SourceError::Exhausted {
                        url,
                        attempts,
                        elapsed,
                        cause,
                        ..
                    } => SourceError::NotWritten {
                        url,
                        attempts,
                        elapsed,
                        cause,
                    },
                    other => other,
                })?;
        }
    }

    pub(super) fn list(&self, below: &str) -> Result<Vec<Entry>, SourceError> {
        let prefix = format!("{}{below}", self.prefix);
        let url = ShardUrl::s3(&self.bucket, &prefix);
        let objects = self.runtime.block_on(async {
            let options = self.sources.retry_options();
            self.s3()
                .await?
                .objects(&url, &self.bucket, &prefix, options)
                .await
        })?;
        let entry = |object: crate::ObjectInfo| Entry {
            name: format!("{below}{}", object.name),
            size: object.size,
        };
        Ok(objects.into_iter().map(entry).collect())
    }

    pub(super) fn open(&self, name: &str) -> Result<ObjectReader, SourceError> {
        let url = self.target(name).url;
        self.runtime.block_on(self.sources.open(&url))
    }

    pub(super) async fn head_object(
        &self,
        target: &ObjectPath,
    ) -> Result<Option<ObjectMeta>, SourceError> {
        self.retry(&target.url, 0, |s3| s3.head(target)).await
    }

    pub(super) fn head(&self, name: &str) -> Result<Option<ObjectMeta>, SourceError> {
        self.runtime.block_on(self.head_object(&self.target(name)))
    }

    pub(super) fn write_if(
        &self,
        name: &str,
        content: &[u8],
        condition: WriteCondition<'_>,
    ) -> Result<ConditionalWrite, SourceError> {
        let target = &self.target(name);
        let body = &bytes::Bytes::copy_from_slice(content);
        self.runtime.block_on(self.retry_at_most(
            CONDITIONAL_ATTEMPTS,
            &target.url,
            content.len(),
            |s3| s3.put_if(target, body.clone(), condition),
        ))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), SourceError> {
        let target = &self.target(name);
        self.runtime
            .block_on(self.retry(&target.url, 0, |s3| s3.delete(target)))
    }

    pub(super) async fn abort(&self, target: &ObjectPath, id: &str) -> Result<(), SourceError> {
        self.retry_at_most(ABORT_ATTEMPTS, &target.url, 0, |s3| s3.abort(target, id))
            .await
    }

    pub(super) fn abort_incomplete_uploads(
        &self,
        ours: impl Fn(&str) -> bool,
    ) -> Result<usize, SourceError> {
        let prefix = &self.target("");
        self.runtime.block_on(async {
            let mut count = 0;
            let mut paging = Paging::default();
            let mut seen = HashSet::new();
            let mut marker: Option<UploadMarker> = None;
            loop {
                let page = self
                    .retry(&prefix.url, 0, |s3| {
                        s3.incomplete_uploads(prefix, marker.as_ref())
                    })
                    .await;
                let page = match page {
                    Ok(page) => page,
                    // Some servers don't support this request, and permission to write does not
                    // include permission to list.
                    Err(error @ (SourceError::Refused { .. } | SourceError::Forbidden { .. })) => {
                        tracing::debug!(%error, "unfinished uploads can't be listed");
                        return Ok(count);
                    }
                    Err(error) => return Err(error),
                };
                let (sent, before) = (page.uploads.len(), seen.len());
                for upload in page.uploads {
                    paging
                        .count(&upload.key)
                        .map_err(|cause| wrong_uploads(&prefix.url, cause))?;
                    if !seen.insert(upload.clone()) {
                        continue;
                    }
                    let name = upload.key.strip_prefix(&self.prefix);
                    if name.is_some_and(&ours) {
                        let target = ObjectPath::new(&self.bucket, upload.key);
                        self.abort(&target, &upload.id).await?;
                        count += 1;
                    }
                }
                let Some(next) = page.next else {
                    return Ok(count);
                };
                let place = format!("{} {}", next.key, next.id);
                paging
                    .advance(place, sent, seen.len() - before)
                    .map_err(|cause| wrong_uploads(&prefix.url, cause))?;
                marker = Some(next);
            }
        })
    }
}
