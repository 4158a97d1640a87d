//! The retry budget of an object, with exponential back-off and full jitter.
//!
//! The budget covers one stretch of the object and not the whole: a shard that is read for an hour
//! meets more passing faults than a shard that takes a second. [`PROGRESS_BYTES`] of progress refill
//! the budget; `max_attempts` failures within one stretch end the run.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use super::error::SourceError;
use super::server::ServerRecord;
use crate::open_files::{self, Wait};

/// Longest wait before the second attempt; it doubles from there.
pub(crate) const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// Attempts at a server that has never answered. A wrong address is then more likely than a passing
/// fault, and the whole budget would only delay the message.
const FIRST_CONTACT_ATTEMPTS: u32 = 4;

/// Bytes read since the first failure that refill the budget.
const PROGRESS_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryOptions {
    pub(crate) max_attempts: u32,
    pub(crate) stall_timeout: Duration,
    pub(crate) first_delay: Duration,
}

/// The failure of a request.
#[derive(Debug)]
pub(crate) enum RequestFailure {
    /// A retry would not help.
    Fatal(SourceError),
    /// The server does not support the request in this form; as [`RequestFailure::Fatal`], unless there
    /// is another form.
    Unsupported(SourceError),
    /// A retry may succeed.
    Passing {
        /// Label in the metrics.
        reason: &'static str,
        /// Text of the error message.
        cause: String,
    },
    /// No connection could be made.
    Connect {
        cause: String,
        endpoint: String,
        hint: &'static str,
    },
    /// No connection could be made, because too many files are open.
    OpenFiles,
}

/// The attempts left for an object.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    url: String,
    options: RetryOptions,
    /// Failures since the budget was last full.
    attempts: u32,
    /// Time of the first of them.
    since: Option<Instant>,
    /// Bytes read since then.
    progress: u64,
    delays: ExponentialBackoff,
    open_files: Wait,
    server: ServerRecord,
}

fn delays(options: RetryOptions) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(options.first_delay)
        .with_max_delay(LONGEST_DELAY)
        .without_max_times()
        .build()
}

impl RetryBudget {
    pub(crate) fn new(url: String, options: RetryOptions, server: ServerRecord) -> Self {
        Self {
            url,
            options,
            attempts: 0,
            since: None,
            progress: 0,
            delays: delays(options),
            open_files: Wait::default(),
            server,
        }
    }

    /// Records that the server answered.
    pub(crate) fn record_response(&self) {
        self.server.record_response();
    }

    /// Records more bytes read.
    pub(crate) fn progress(&mut self, bytes: usize) {
        if self.attempts == 0 {
            return;
        }
        self.progress += bytes as u64;
        if self.progress >= PROGRESS_BYTES {
            self.attempts = 0;
            self.progress = 0;
            self.since = None;
            self.delays = delays(self.options);
        }
    }

    /// Counts a reconnect after an idle connection; it is not charged to the budget.
    pub(crate) fn record_idle_reconnect(&self) {
        self.server.record_retry("idle");
    }

    /// Charges a failed attempt at `offset` to the budget and waits before the next. Too many open files say nothing of the server:
    /// they have a budget of their own.
    ///
    /// # Errors
    /// When the failure is final or the budget is spent.
    pub(crate) async fn backoff(
        &mut self,
        failure: RequestFailure,
        offset: u64,
    ) -> Result<(), SourceError> {
        if matches!(failure, RequestFailure::OpenFiles) {
            let Some(pause) = self.open_files.after_failure() else {
                let (url, cause) = (self.url.clone(), open_files::message());
                return Err(SourceError::OpenFiles { url, cause });
            };
            self.server.record_retry("open_files");
            tokio::time::sleep(pause).await;
            return Ok(());
        }
        self.attempts += 1;
        let started = *self.since.get_or_insert_with(Instant::now);
        let spent = self.attempts >= self.options.max_attempts;
        let url = self.url.clone();
        let (reason, cause) = match failure {
            RequestFailure::Fatal(error) | RequestFailure::Unsupported(error) => return Err(error),
            RequestFailure::Connect {
                cause,
                endpoint,
                hint,
            } if !self.server.has_answered()
                && (spent || self.attempts >= FIRST_CONTACT_ATTEMPTS) =>
            {
                return Err(SourceError::Unreachable {
                    url,
                    endpoint,
                    attempts: self.attempts,
                    cause,
                    hint,
                });
            }
            RequestFailure::OpenFiles => ("open_files", open_files::message()),
            RequestFailure::Connect { cause, .. } => ("connect", cause),
            RequestFailure::Passing { reason, cause } => (reason, cause),
        };
        if spent {
            return Err(SourceError::Exhausted {
                url,
                attempts: self.attempts,
                elapsed: started.elapsed(),
                offset,
                cause,
            });
        }
        self.server.record_retry(reason);
        // Full jitter: ranks that fail together must not retry together.
        let delay = self
            .delays
            .next()
            .unwrap_or(LONGEST_DELAY)
            .mul_f64(fastrand::f64());
        tracing::debug!(url = %self.url, attempt = self.attempts, reason, %cause, ?delay, "retrying");
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(max_attempts: u32) -> RetryBudget {
        let options = RetryOptions {
            max_attempts,
            stall_timeout: Duration::from_secs(1),
            first_delay: Duration::from_millis(1),
        };
        RetryBudget::new("s3://b/k".into(), options, ServerRecord::s3())
    }

    fn passing() -> RequestFailure {
        RequestFailure::Passing {
            reason: "server_error",
            cause: "503".into(),
        }
    }

    fn connect() -> RequestFailure {
        RequestFailure::Connect {
            cause: "connection refused".into(),
            endpoint: "http://x".into(),
            hint: "",
        }
    }

    #[tokio::test]
    async fn retry_budget_ends_with_the_cause() {
        let mut budget = budget(3);
        budget.backoff(passing(), 0).await.unwrap();
        budget.backoff(passing(), 5).await.unwrap();
        let error = budget.backoff(passing(), 7).await.unwrap_err();
        assert!(
            matches!(
                error,
                SourceError::Exhausted {
                    attempts: 3,
                    offset: 7,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("503"), "{error}");
        assert_eq!(budget.server.counts().retries["server_error"], 2);
    }

    #[tokio::test]
    async fn retry_budget_is_short_for_an_unseen_server() {
        let mut fresh = budget(100);
        for _ in 0..3 {
            fresh.backoff(connect(), 0).await.unwrap();
        }
        let error = fresh.backoff(connect(), 0).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Unreachable { attempts: 4, .. }),
            "{error:?}"
        );
        let mut known = budget(100);
        known.record_response();
        for _ in 0..6 {
            known.backoff(connect(), 0).await.unwrap();
        }
    }

    #[tokio::test]
    async fn retry_budget_is_refilled_by_progress() {
        let mut budget = budget(3);
        for _ in 0..20 {
            budget.backoff(passing(), 0).await.unwrap();
            budget.backoff(passing(), 0).await.unwrap();
            budget.progress(PROGRESS_BYTES as usize / 2);
            budget.progress(PROGRESS_BYTES as usize / 2);
        }
        // Smaller steps do not refill it.
        budget.backoff(passing(), 0).await.unwrap();
        budget.progress(1000);
        budget.backoff(passing(), 0).await.unwrap();
        budget.progress(1000);
        let error = budget.backoff(passing(), 0).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Exhausted { attempts: 3, .. }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn server_record_is_shared_by_readers() {
        let (first, mut second) = (budget(100), budget(100));
        second.server = first.server.clone();
        first.record_response();
        for _ in 0..6 {
            second.backoff(connect(), 0).await.unwrap();
        }
    }
}
