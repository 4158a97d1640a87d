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
#[derive(Debug, Clone)]
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

/// Which version of an object is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Condition<'a> {
    None,
    Is(&'a str),
    IsNot(&'a str),
}

/// What is known of an object that was read before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) version: Option<String>,
    pub(crate) size: u64,
}

impl Known {
    /// Whether this is the object of the response; by its size, where it has no version.
    fn is(&self, part: &Part) -> bool {
        match (&self.version, &part.version) {
            (None, None) => part.total == Some(self.size),
            (one, other) => one == other,
        }
    }
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
        condition: Condition<'_>,
    ) -> Result<Option<Part>, Failure> {
        match self {
            Self::S3 { s3, bucket, key } => s3.get(url, bucket, key, offset, condition).await,
            Self::Http { client, address } => {
                http::get(client, url, address, offset, condition).await
            }
        }
    }

    /// Who is asked, where the URL does not say it.
    pub(crate) fn server(&self) -> &str {
        match self {
            Self::S3 { s3, .. } => s3.endpoint(),
            Self::Http { .. } => "",
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
    fn new(url: &ShardUrl, remote: Remote, options: RetryOptions, metrics: FlowMetrics) -> Self {
        let is_s3 = matches!(remote, Remote::S3 { .. });
        Self {
            url: url.clone(),
            remote,
            options,
            budget: Budget::new(url.redacted(), options, metrics, is_s3),
            body: None,
            offset: 0,
            skip: 0,
            total: None,
            version: None,
        }
    }

    /// Opens an object at its first byte.
    pub(crate) async fn open(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        metrics: FlowMetrics,
    ) -> Result<Self, SourceError> {
        let mut reader = Self::new(url, remote, options, metrics);
        reader.connect(None).await?;
        Ok(reader)
    }

    /// Opens an object at its first byte; `None` if it still is the one that is `known`.
    pub(crate) async fn open_unless(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        metrics: FlowMetrics,
        known: Option<&Known>,
    ) -> Result<Option<Self>, SourceError> {
        let mut reader = Self::new(url, remote, options, metrics);
        let sent = reader.connect(known).await?;
        Ok(sent.then_some(reader))
    }

    /// Goes on from `offset` with the version that is `known`.
    pub(crate) async fn resume(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        metrics: FlowMetrics,
        known: &Known,
        offset: u64,
    ) -> Result<Self, SourceError> {
        let mut reader = Self::new(url, remote, options, metrics);
        reader.total = Some(known.size);
        reader.version.clone_from(&known.version);
        reader.offset = offset;
        reader.connect(None).await?;
        Ok(reader)
    }

    pub(crate) fn size(&self) -> Option<u64> {
        self.total
    }

    pub(crate) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Requests the object from where reading has come to, until that works; whether it is sent, and
    /// not still the one that is `known`.
    async fn connect(&mut self, known: Option<&Known>) -> Result<bool, SourceError> {
        loop {
            let known_version = known.and_then(|known| known.version.as_deref());
            let condition = match (self.version.as_deref(), known_version) {
                (Some(version), _) => Condition::Is(version),
                (None, Some(version)) => Condition::IsNot(version),
                (None, None) => Condition::None,
            };
            let request = self.remote.get(&self.url, self.offset, condition);
            let failure = match timeout(self.options.stall_timeout, request).await {
                Ok(Ok(None)) if known_version.is_some() => return Ok(false),
                Ok(Ok(None)) => Failure::Fatal(SourceError::Refused {
                    url: self.url.redacted(),
                    cause: "the server says \"not modified\" (HTTP 304) of what was never read"
                        .to_owned(),
                }),
                Ok(Ok(Some(part))) => {
                    // Not every server looks at the condition.
                    if known.is_some_and(|known| known.is(&part)) {
                        return Ok(false);
                    }
                    return self.accept(part).map(|()| true);
                }
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
                self.connect(None).await?;
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
