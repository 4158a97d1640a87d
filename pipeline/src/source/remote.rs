//! Reading an object over the network so that faults on the way don't show: a body that breaks off
//! goes on from the byte it had, of the same version of the object.
//!
//! Only the time spent waiting for the server is held against it. A consumer may leave a body alone
//! for as long as it likes: a connection that the server closes meanwhile is opened again, and that
//! costs no attempt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use super::error::SourceError;
use super::retry::{Budget, Failure, Met, RetryOptions};
use super::{http, s3};
use crate::flow::FlowMetrics;
use crate::shard::ShardUrl;

/// A server that sends less than this, in bytes a second, might as well send nothing.
const LEAST_PACE: f64 = 1024.0;
/// The pace is judged whenever so many stall timeouts were spent waiting.
const PACE_WINDOW: u32 = 2;

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
        met: Met,
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
            Self::Http {
                client, address, ..
            } => http::get(client, url, address, offset, condition).await,
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

/// How fast a body comes, over the time that was spent waiting for it.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: usize,
}

impl Pace {
    /// Counts a chunk; what is wrong, if over a whole window too little came.
    fn count(&mut self, waited: Duration, bytes: usize, window: Duration) -> Option<Failure> {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < window {
            return None;
        }
        let seen = std::mem::take(self);
        let seconds = seen.waited.as_secs_f64();
        ((seen.bytes as f64) < LEAST_PACE * seconds).then(|| Failure::Passing {
            reason: "too_slow",
            cause: format!("only {} bytes in {seconds:.1} s", seen.bytes),
        })
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
    pace: Pace,
    /// When the last bytes were handed out.
    left: Instant,
    /// Whether the consumer has left this connection alone so long that the server may close it.
    left_alone: bool,
}

impl RemoteReader {
    fn new(url: &ShardUrl, remote: Remote, options: RetryOptions, metrics: FlowMetrics) -> Self {
        let (met, is_s3) = match &remote {
            Remote::S3 { s3, .. } => (s3.met(), true),
            Remote::Http { met, .. } => (met.clone(), false),
        };
        Self {
            url: url.clone(),
            remote,
            options,
            budget: Budget::new(url.redacted(), options, metrics, met, is_s3),
            body: None,
            offset: 0,
            skip: 0,
            total: None,
            version: None,
            pace: Pace::default(),
            left: Instant::now(),
            left_alone: false,
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
            if let (Some(old), Some(new)) = (&self.version, &part.version)
                && old != new
            {
                return Err(self.changed(format!("version {old} became {new}")));
            }
            if let (Some(old), Some(new)) = (self.total, part.total)
                && old != new
            {
                return Err(self.changed(format!("{old} bytes became {new}")));
            }
            if part.start > self.offset {
                return Err(self.changed(format!("the rest begins at {}", part.start)));
            }
        }
        self.skip = self.offset - part.start;
        self.body = Some(part.body);
        self.pace = Pace::default();
        self.left_alone = false;
        Ok(())
    }

    fn changed(&self, cause: String) -> SourceError {
        SourceError::Changed {
            url: self.url.redacted(),
            offset: self.offset,
            cause,
        }
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
        let next = self.advance().await;
        self.left = Instant::now();
        next
    }

    async fn advance(&mut self) -> Result<Option<Bytes>, SourceError> {
        // What was on its way still comes, so the end of such a connection shows only later.
        self.left_alone |= self.left.elapsed() >= self.options.stall_timeout;
        loop {
            let Some(body) = &mut self.body else {
                if self.total == Some(self.offset) {
                    return Ok(None);
                }
                self.connect(None).await?;
                continue;
            };
            let waiting = Instant::now();
            let failure = match timeout(self.options.stall_timeout, body.next()).await {
                Ok(Ok(Some(chunk))) => {
                    let slow = self.pace.count(
                        waiting.elapsed(),
                        chunk.len(),
                        self.options.stall_timeout * PACE_WINDOW,
                    );
                    let chunk = self.take(chunk)?;
                    if let Some(failure) = slow {
                        self.body = None;
                        self.budget.failed(failure, self.offset).await?;
                    }
                    if chunk.is_empty() {
                        continue;
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
            if std::mem::take(&mut self.left_alone) {
                self.budget.excused("idle");
            } else {
                self.budget.failed(failure, self.offset).await?;
            }
        }
    }

    /// The part of a chunk that wasn't had before.
    fn take(&mut self, mut chunk: Bytes) -> Result<Bytes, SourceError> {
        let skipped = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        self.skip -= skipped as u64;
        let chunk = chunk.split_off(skipped);
        self.offset += chunk.len() as u64;
        if let Some(total) = self.total.filter(|total| self.offset > *total) {
            return Err(self.changed(format!("more than its {total} bytes came")));
        }
        self.budget.progress(chunk.len());
        Ok(chunk)
    }
}
