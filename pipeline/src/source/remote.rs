//! Reading an object over the network so that faults on the way don't show: a body that breaks off
//! goes on from the byte it had, of the same version of the object.

use std::sync::Arc;

use bytes::Bytes;
use tokio::time::timeout;

use super::error::SourceError;
use super::retry::{Budget, Failure, RetryOptions};
use super::{http, s3};
use crate::flow::FlowMetrics;
use crate::shard::ShardUrl;

/// Where an object is, and who to ask.
#[derive(Debug)]
pub(crate) enum Remote {
    S3 {
        s3: Arc<s3::S3>,
        bucket: String,
        key: String,
    },
    Http {
        client: reqwest::Client,
        address: String,
    },
}

/// A response whose body is still to be read.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) body: Body,
    /// Where in the object the body begins.
    pub(crate) start: u64,
    /// The whole object's size.
    pub(crate) total: Option<u64>,
    /// What names this version of the object.
    pub(crate) version: Option<String>,
}

#[derive(Debug)]
pub(crate) enum Body {
    S3(aws_sdk_s3::primitives::ByteStream),
    Http(reqwest::Response),
}

impl Body {
    async fn next(&mut self) -> Result<Option<Bytes>, String> {
        match self {
            Self::S3(stream) => stream
                .try_next()
                .await
                .map_err(|error| super::error::causes(&error)),
            Self::Http(response) => response
                .chunk()
                .await
                .map_err(|error| super::error::causes(&error)),
        }
    }
}

impl Remote {
    async fn get(
        &self,
        url: &ShardUrl,
        offset: u64,
        version: Option<&str>,
    ) -> Result<Part, Failure> {
        match self {
            Self::S3 { s3, bucket, key } => s3.get(url, bucket, key, offset, version).await,
            Self::Http { client, address } => {
                http::get(client, url, address, offset, version).await
            }
        }
    }
}

/// An object being read over the network.
#[derive(Debug)]
pub(crate) struct RemoteReader {
    url: ShardUrl,
    remote: Remote,
    options: RetryOptions,
    budget: Budget,
    body: Option<Body>,
    offset: u64,
    /// Bytes of the body to drop: a server that ignores ranges begins anew.
    skip: u64,
    total: Option<u64>,
    version: Option<String>,
}

impl RemoteReader {
    pub(crate) async fn open(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        metrics: FlowMetrics,
    ) -> Result<Self, SourceError> {
        let is_s3 = matches!(remote, Remote::S3 { .. });
        let mut reader = Self {
            url: url.clone(),
            remote,
            options,
            budget: Budget::new(url.redacted(), options, metrics, is_s3),
            body: None,
            offset: 0,
            skip: 0,
            total: None,
            version: None,
        };
        reader.connect().await?;
        Ok(reader)
    }

    pub(crate) fn size(&self) -> Option<u64> {
        self.total
    }

    pub(crate) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Requests the object from where reading has come to, until that works.
    async fn connect(&mut self) -> Result<(), SourceError> {
        loop {
            let request = self
                .remote
                .get(&self.url, self.offset, self.version.as_deref());
            let failure = match timeout(self.options.stall_timeout, request).await {
                Ok(Ok(part)) => return self.accept(part),
                Ok(Err(failure)) => failure,
                Err(_) => self.stalled(),
            };
            self.budget.failed(failure, self.offset).await?;
        }
    }

    fn accept(&mut self, part: Part) -> Result<(), SourceError> {
        self.budget.contact();
        let first = self.offset == 0 && self.version.is_none() && self.total.is_none();
        if first {
            self.total = part.total;
            self.version = part.version;
        } else {
            // Not every server honours If-Match, so what it sends is compared as well.
            let other_version =
                self.version.is_some() && part.version.is_some() && self.version != part.version;
            let other_size =
                self.total.is_some() && part.total.is_some() && self.total != part.total;
            if other_version || other_size || part.start > self.offset {
                return Err(SourceError::Changed {
                    url: self.url.redacted(),
                    offset: self.offset,
                });
            }
        }
        self.skip = self.offset - part.start;
        self.body = Some(part.body);
        Ok(())
    }

    fn stalled(&self) -> Failure {
        Failure::Passing {
            reason: "stalled",
            cause: format!(
                "no data for {:.1} s",
                self.options.stall_timeout.as_secs_f64()
            ),
        }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            let Some(body) = &mut self.body else {
                if self.total == Some(self.offset) {
                    return Ok(None);
                }
                self.connect().await?;
                continue;
            };
            // Only waiting for the server counts: a slow consumer isn't in here.
            let failure = match timeout(self.options.stall_timeout, body.next()).await {
                Ok(Ok(Some(mut chunk))) => {
                    let skipped = usize::try_from(self.skip)
                        .unwrap_or(usize::MAX)
                        .min(chunk.len());
                    self.skip -= skipped as u64;
                    let chunk = chunk.split_off(skipped);
                    if chunk.is_empty() {
                        continue;
                    }
                    self.offset += chunk.len() as u64;
                    if self.total.is_some_and(|total| self.offset > total) {
                        return Err(SourceError::Changed {
                            url: self.url.redacted(),
                            offset: self.offset,
                        });
                    }
                    return Ok(Some(chunk));
                }
                Ok(Ok(None)) => match self.total {
                    Some(total) if self.offset < total => Failure::Passing {
                        reason: "short_body",
                        cause: format!("the body ended after {} of {total} bytes", self.offset),
                    },
                    _ => {
                        self.total = Some(self.offset);
                        self.body = None;
                        return Ok(None);
                    }
                },
                Ok(Err(cause)) => Failure::Passing {
                    reason: "body",
                    cause: format!("the body broke off: {cause}"),
                },
                Err(_) => self.stalled(),
            };
            self.body = None;
            self.budget.failed(failure, self.offset).await?;
        }
    }
}
