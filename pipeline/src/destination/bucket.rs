//! A prefix in S3: repeating requests until they are answered for good.

use std::fmt;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::OnceCell;

use super::{Entry, Facts, PartOptions};
use crate::shard::ShardUrl;
use crate::source::retry::{Budget, Failure, RetryOptions};
use crate::source::s3::{S3, Target};
use crate::source::{ObjectReader, SourceError, Sources};

/// A server that takes less than this, in bytes a second, is given up as one that has stalled.
const LEAST_PACE: u64 = 128 << 10;
/// Attempts at clearing away what was given up: it must not hold up the error that led to it.
const ABORT_ATTEMPTS: u32 = 3;

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

    pub(super) fn target(&self, name: &str) -> Target {
        Target::new(&self.bucket, format!("{}{name}", self.prefix))
    }

    pub(super) async fn s3(&self) -> Result<&S3, SourceError> {
        let s3 = self.s3.get_or_try_init(|| self.sources.s3()).await?;
        Ok(s3)
    }

    /// Makes a request until it is answered for good; `bytes` are sent with it.
    pub(super) async fn repeat<'a, T, F>(
        &'a self,
        url: &ShardUrl,
        bytes: usize,
        request: impl Fn(&'a S3) -> F + Send,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Failure>> + Send,
    {
        self.repeat_at_most(u32::MAX, url, bytes, request).await
    }

    async fn repeat_at_most<'a, T, F>(
        &'a self,
        attempts: u32,
        url: &ShardUrl,
        bytes: usize,
        request: impl Fn(&'a S3) -> F + Send,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, Failure>> + Send,
    {
        let s3 = self.s3().await?;
        let options = self.sources.retry_options();
        let options = RetryOptions {
            max_attempts: options.max_attempts.min(attempts),
            ..options
        };
        let stall = self.sources.options().stall_timeout;
        let patience = stall + Duration::from_secs_f64(bytes as f64 / LEAST_PACE as f64);
        let metrics = self.sources.metrics().clone();
        let mut budget = Budget::new(url.redacted(), options, metrics, s3.met(), true);
        loop {
            let failure = match tokio::time::timeout(patience, request(s3)).await {
                Ok(Ok(answer)) => {
                    budget.contact();
                    return Ok(answer);
                }
                Ok(Err(failure)) => failure,
                Err(_) => Failure::Passing {
                    reason: "stalled",
                    cause: format!("no answer for {:.1} s", patience.as_secs_f64()),
                },
            };
            budget
                .failed(failure, 0)
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

    pub(super) async fn head(&self, target: &Target) -> Result<Option<Facts>, SourceError> {
        let found = self.repeat(&target.url, 0, |s3| s3.head(target)).await?;
        Ok(found.map(|(size, metadata)| Facts { size, metadata }))
    }

    pub(super) fn facts(&self, name: &str) -> Result<Option<Facts>, SourceError> {
        self.runtime.block_on(self.head(&self.target(name)))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), SourceError> {
        let target = &self.target(name);
        self.runtime
            .block_on(self.repeat(&target.url, 0, |s3| s3.delete(target)))
    }

    pub(super) async fn abort(&self, target: &Target, id: &str) -> Result<(), SourceError> {
        self.repeat_at_most(ABORT_ATTEMPTS, &target.url, 0, |s3| s3.abort(target, id))
            .await
    }

    pub(super) fn clear_unfinished(
        &self,
        ours: impl Fn(&str) -> bool,
    ) -> Result<usize, SourceError> {
        let url = &ShardUrl::s3(&self.bucket, &self.prefix);
        let place = (self.bucket.as_str(), self.prefix.as_str());
        self.runtime.block_on(async {
            let (mut count, mut from) = (0, None);
            loop {
                let page = self
                    .repeat(url, 0, |s3| s3.unfinished(url, place, from.as_ref()))
                    .await;
                let (uploads, next) = match page {
                    Ok(page) => page,
                    // Some servers don't know this request; and who may write need not be allowed to list.
                    Err(error @ (SourceError::Refused { .. } | SourceError::Forbidden { .. })) => {
                        tracing::debug!(%error, "unfinished uploads can't be listed");
                        return Ok(count);
                    }
                    Err(error) => return Err(error),
                };
                for upload in uploads {
                    let name = upload.key.strip_prefix(&self.prefix);
                    if name.is_some_and(&ours) {
                        let target = Target::new(&self.bucket, upload.key);
                        self.abort(&target, &upload.id).await?;
                        count += 1;
                    }
                }
                match next {
                    Some(next) => from = Some(next),
                    None => return Ok(count),
                }
            }
        })
    }
}
