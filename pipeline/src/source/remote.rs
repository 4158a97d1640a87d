//! Reading an object over the network and hiding passing faults: a broken body is resumed from the
//! byte reached, in the same version of the object.
//!
//! Only the time spent waiting for the server counts against the server. A consumer may leave a body
//! idle for any time: a connection that the server closes meanwhile is opened again, at no cost to the
//! retry budget.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use super::http::HttpClient;
use crate::net::{
    Body, Condition, GetResult, RequestFailure, RetryBudget, RetryOptions, ServerRecord,
    SourceError,
};
use crate::plural::counted;
use crate::s3::S3;
use crate::shard::{HttpUrl, ShardUrl};

/// Slowest accepted pace. Bytes a second.
const LEAST_PACE: f64 = 1024.0;
/// Waiting time over which the pace is measured. Stall timeouts.
const PACE_WINDOW: u32 = 2;

/// The place of an object, with the client that reads it.
#[derive(Debug, Clone)]
pub(crate) enum Remote {
    S3 {
        s3: Arc<S3>,
        bucket: String,
        key: String,
    },
    Http {
        client: HttpClient,
        address: HttpUrl,
        /// The Hub's address, for a file on the Hub; else empty.
        hub: String,
        server: ServerRecord,
    },
}

/// The version of an object that was read before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectVersion {
    pub(crate) version: Option<String>,
    pub(crate) size: u64,
}

impl ObjectVersion {
    /// Whether the response is of this version; compared by size where there is no version.
    fn is(&self, response: &GetResult) -> bool {
        match (&self.version, &response.version) {
            (None, None) => response.total == Some(self.size),
            (one, other) => one == other,
        }
    }
}

impl Remote {
    async fn get(
        &self,
        url: &ShardUrl,
        offset: u64,
        condition: Condition<'_>,
    ) -> Result<Option<GetResult>, RequestFailure> {
        match self {
            Self::S3 { s3, bucket, key } => s3.get(url, bucket, key, offset, condition).await,
            Self::Http {
                client, address, ..
            } => client.get(url, address.expose(), offset, condition).await,
        }
    }

    /// The server's address, where the URL does not contain it.
    pub(crate) fn endpoint(&self) -> &str {
        match self {
            Self::S3 { s3, .. } => s3.endpoint(),
            Self::Http { hub, .. } => hub,
        }
    }
}

/// The pace of a body, over the time spent waiting for it.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: usize,
}

impl Pace {
    /// Counts a chunk; returns a failure if too few bytes came over a whole window.
    fn count(
        &mut self,
        waited: Duration,
        bytes: usize,
        window: Duration,
    ) -> Option<RequestFailure> {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < window {
            return None;
        }
        let seen = std::mem::take(self);
        let seconds = seen.waited.as_secs_f64();
        ((seen.bytes as f64) < LEAST_PACE * seconds).then(|| RequestFailure::Passing {
            reason: "too_slow",
            cause: format!("only {} in {seconds:.1} s", counted(seen.bytes, "byte")),
        })
    }
}

/// An object being read over the network.
#[derive(Debug)]
pub(crate) struct RemoteReader {
    url: ShardUrl,
    remote: Remote,
    options: RetryOptions,
    budget: RetryBudget,
    body: Option<Body>,
    offset: u64,
    /// Bytes of the body to drop: a server that ignores ranges sends the object from its start.
    skip: u64,
    total: Option<u64>,
    version: Option<String>,
    pace: Pace,
    /// When the last bytes were handed out.
    handed_out: Instant,
    /// Whether the server refuses conditions; its versions are then compared here alone.
    unconditional: bool,
    /// Whether the connection was idle for so long that the server may close it.
    idle: bool,
}

impl RemoteReader {
    fn new(url: &ShardUrl, remote: Remote, options: RetryOptions) -> Self {
        let server = match &remote {
            Remote::S3 { s3, .. } => s3.server().clone(),
            Remote::Http { server, .. } => server.clone(),
        };
        Self {
            url: url.clone(),
            remote,
            options,
            budget: RetryBudget::new(url.to_string(), options, server),
            body: None,
            offset: 0,
            skip: 0,
            total: None,
            version: None,
            pace: Pace::default(),
            handed_out: Instant::now(),
            unconditional: false,
            idle: false,
        }
    }

    /// Opens an object at its first byte.
    pub(crate) async fn open(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
    ) -> Result<Self, SourceError> {
        let mut reader = Self::new(url, remote, options);
        reader.connect(None).await?;
        Ok(reader)
    }

    /// Opens an object at its first byte; `None` if it still is the `known` version.
    pub(crate) async fn open_unless(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        known: Option<&ObjectVersion>,
    ) -> Result<Option<Self>, SourceError> {
        let mut reader = Self::new(url, remote, options);
        let sent = reader.connect(known).await?;
        Ok(sent.then_some(reader))
    }

    /// Resumes the `known` version from byte `offset`.
    pub(crate) async fn resume(
        url: &ShardUrl,
        remote: Remote,
        options: RetryOptions,
        known: &ObjectVersion,
        offset: u64,
    ) -> Result<Self, SourceError> {
        let mut reader = Self::new(url, remote, options);
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

    /// Requests the object from the byte reached, with retries. Returns `false` if it still is the `known`
    /// version and nothing is sent.
    async fn connect(&mut self, known: Option<&ObjectVersion>) -> Result<bool, SourceError> {
        loop {
            let known_version = known.and_then(|known| known.version.as_deref());
            let condition = match (self.version.as_deref(), known_version) {
                _ if self.unconditional => Condition::None,
                (Some(version), _) => Condition::Is(version),
                (None, Some(version)) => Condition::IsNot(version),
                (None, None) => Condition::None,
            };
            let has_condition = !matches!(condition, Condition::None);
            let request = self.remote.get(&self.url, self.offset, condition);
            let failure = match timeout(self.options.stall_timeout, request).await {
                Ok(Ok(None)) if known_version.is_some() => return Ok(false),
                Ok(Ok(None)) => RequestFailure::Fatal(SourceError::Refused {
                    url: self.url.to_string(),
                    cause: "the server says \"not modified\" (HTTP 304) of what was never read"
                        .to_owned(),
                }),
                Ok(Ok(Some(response))) => {
                    // Some servers ignore the condition.
                    if known.is_some_and(|known| known.is(&response)) {
                        return Ok(false);
                    }
                    return self.accept(response).map(|()| true);
                }
                Ok(Err(RequestFailure::Unsupported(_))) if has_condition => {
                    self.unconditional = true;
                    continue;
                }
                Ok(Err(failure)) => failure,
                Err(_) => self.stalled(),
            };
            self.budget.backoff(failure, self.offset).await?;
        }
    }

    fn accept(&mut self, response: GetResult) -> Result<(), SourceError> {
        self.budget.record_response();
        let first = self.offset == 0 && self.version.is_none() && self.total.is_none();
        if first {
            self.total = response.total;
            self.version = response.version;
        } else {
            // Some servers ignore If-Match, so the response is compared as well.
            if let (Some(old), Some(new)) = (&self.version, &response.version)
                && old != new
            {
                return Err(self.changed(format!("version {old} became {new}")));
            }
            if let (Some(old), Some(new)) = (self.total, response.total)
                && old != new
            {
                return Err(self.changed(format!("{old} bytes became {new}")));
            }
            if response.start > self.offset {
                return Err(self.changed(format!("the rest begins at {}", response.start)));
            }
        }
        self.skip = self.offset - response.start;
        self.body = Some(response.body);
        self.pace = Pace::default();
        self.idle = false;
        Ok(())
    }

    fn changed(&self, cause: String) -> SourceError {
        SourceError::Changed {
            url: self.url.to_string(),
            offset: self.offset,
            cause,
        }
    }

    fn stalled(&self) -> RequestFailure {
        RequestFailure::Passing {
            reason: "stalled",
            cause: format!(
                "no data for {:.1} s",
                self.options.stall_timeout.as_secs_f64()
            ),
        }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let next = self.advance().await;
        self.handed_out = Instant::now();
        next
    }

    async fn advance(&mut self) -> Result<Option<Bytes>, SourceError> {
        // Bytes on their way still arrive, so a closed connection shows only later.
        self.idle |= self.handed_out.elapsed() >= self.options.stall_timeout;
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
                        self.budget.backoff(failure, self.offset).await?;
                    }
                    if chunk.is_empty() {
                        continue;
                    }
                    return Ok(Some(chunk));
                }
                Ok(Ok(None)) => match self.total {
                    Some(total) if self.offset < total => RequestFailure::Passing {
                        reason: "short_body",
                        cause: format!(
                            "the body ended after {} of {}",
                            self.offset,
                            counted(total, "byte")
                        ),
                    },
                    _ => {
                        self.total = Some(self.offset);
                        self.body = None;
                        return Ok(None);
                    }
                },
                Ok(Err(cause)) => RequestFailure::Passing {
                    reason: "body",
                    cause: format!("the body broke off: {cause}"),
                },
                Err(_) => self.stalled(),
            };
            self.body = None;
            if std::mem::take(&mut self.idle) {
                self.budget.record_idle_reconnect();
            } else {
                self.budget.backoff(failure, self.offset).await?;
            }
        }
    }

    /// The bytes of a chunk that were not read before.
    fn take(&mut self, mut chunk: Bytes) -> Result<Bytes, SourceError> {
        let skipped = usize::try_from(self.skip)
            .unwrap_or(usize::MAX)
            .min(chunk.len());
        self.skip -= skipped as u64;
        let chunk = chunk.split_off(skipped);
        self.offset += chunk.len() as u64;
        if let Some(total) = self.total.filter(|total| self.offset > *total) {
            return Err(self.changed(format!("more than its {} came", counted(total, "byte"))));
        }
        self.budget.progress(chunk.len());
        Ok(chunk)
    }
}
