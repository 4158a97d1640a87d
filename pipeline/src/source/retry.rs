//! One budget of attempts an object, with exponential back-off and full jitter.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use super::error::SourceError;
use crate::flow::FlowMetrics;

/// Longest wait before the second attempt; it doubles from there.
pub(crate) const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// Attempts at a server that never answered yet. It is more likely a wrong address than a passing
/// fault, and waiting out the whole budget would only hide that.
const FIRST_CONTACT_ATTEMPTS: u32 = 4;

#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryOptions {
    pub(crate) max_attempts: u32,
    pub(crate) stall_timeout: Duration,
    pub(crate) first_delay: Duration,
}

/// How a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Repeating won't help.
    Fatal(SourceError),
    /// It may pass.
    Passing {
        /// For the metrics.
        reason: &'static str,
        /// For people.
        cause: String,
    },
    /// No connection could be made.
    Connect {
        cause: String,
        endpoint: String,
        hint: &'static str,
    },
}

/// What is left of an object's attempts.
#[derive(Debug)]
pub(crate) struct Budget {
    url: String,
    max_attempts: u32,
    attempts: u32,
    contact: bool,
    started: Instant,
    delays: ExponentialBackoff,
    metrics: FlowMetrics,
    counts_as_s3: bool,
}

impl Budget {
    pub(crate) fn new(
        url: String,
        options: RetryOptions,
        metrics: FlowMetrics,
        counts_as_s3: bool,
    ) -> Self {
        Self {
            url,
            max_attempts: options.max_attempts,
            attempts: 0,
            contact: false,
            started: Instant::now(),
            delays: ExponentialBuilder::new()
                .with_min_delay(options.first_delay)
                .with_max_delay(LONGEST_DELAY)
                .without_max_times()
                .build(),
            metrics,
            counts_as_s3,
        }
    }

    /// The server answered: from now on a failed connection is a passing fault.
    pub(crate) fn contact(&mut self) {
        self.contact = true;
    }

    /// Counts a failed attempt at `offset` and waits before the next.
    ///
    /// # Errors
    /// When the failure is final or the budget is spent.
    pub(crate) async fn failed(
        &mut self,
        failure: Failure,
        offset: u64,
    ) -> Result<(), SourceError> {
        self.attempts += 1;
        let (reason, cause) = match failure {
            Failure::Fatal(error) => return Err(error),
            Failure::Connect {
                cause,
                endpoint,
                hint,
            } if !self.contact => {
                if self.attempts >= self.max_attempts.min(FIRST_CONTACT_ATTEMPTS) {
                    return Err(SourceError::Unreachable {
                        url: self.url.clone(),
                        endpoint,
                        attempts: self.attempts,
                        cause,
                        hint,
                    });
                }
                ("connect", cause)
            }
            Failure::Connect { cause, .. } => ("connect", cause),
            Failure::Passing { reason, cause } => (reason, cause),
        };
        if self.attempts >= self.max_attempts {
            return Err(SourceError::Exhausted {
                url: self.url.clone(),
                attempts: self.attempts,
                elapsed: self.started.elapsed(),
                offset,
                cause,
            });
        }
        if self.counts_as_s3 {
            self.metrics.s3_retry(reason);
        }
        // Full jitter: many ranks that fail together must not come back together.
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

    fn budget(max_attempts: u32) -> Budget {
        let options = RetryOptions {
            max_attempts,
            stall_timeout: Duration::from_secs(1),
            first_delay: Duration::from_millis(1),
        };
        Budget::new("s3://b/k".into(), options, FlowMetrics::new(), true)
    }

    fn passing() -> Failure {
        Failure::Passing {
            reason: "server_error",
            cause: "503".into(),
        }
    }

    fn connect() -> Failure {
        Failure::Connect {
            cause: "connection refused".into(),
            endpoint: "http://x".into(),
            hint: "",
        }
    }

    #[tokio::test]
    async fn a_budget_ends_with_the_cause() {
        let mut budget = budget(3);
        budget.failed(passing(), 0).await.unwrap();
        budget.failed(passing(), 5).await.unwrap();
        let error = budget.failed(passing(), 7).await.unwrap_err();
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
        assert_eq!(budget.metrics.snapshot().s3_retries["server_error"], 2);
    }

    #[tokio::test]
    async fn a_server_never_met_is_given_up_early() {
        let mut fresh = budget(100);
        for _ in 0..3 {
            fresh.failed(connect(), 0).await.unwrap();
        }
        let error = fresh.failed(connect(), 0).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Unreachable { attempts: 4, .. }),
            "{error:?}"
        );
        let mut known = budget(100);
        known.contact();
        for _ in 0..6 {
            known.failed(connect(), 0).await.unwrap();
        }
    }
}
