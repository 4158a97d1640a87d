//! One budget of attempts an object, with exponential back-off and full jitter.
//!
//! The budget is for one place of the object, not for all of it: a shard that is read for an hour
//! meets more faults than one that takes a second, and each of them passes. So the attempts are
//! given back with every [`PROGRESS_BYTES`] read, and what ends the run is `max_attempts` failures
//! within one such stretch.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// Reading so many bytes since the first failure fills the budget again.
const PROGRESS_BYTES: u64 = 1 << 20;

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

/// Whether a server has answered before, for everybody who reads from it: from then on a failed
/// connection is a passing fault and no wrong address.
#[derive(Debug, Clone, Default)]
pub(crate) struct Met(Arc<AtomicBool>);

impl Met {
    pub(crate) fn answered(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn has_answered(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is left of an object's attempts.
#[derive(Debug)]
pub(crate) struct Budget {
    url: String,
    options: RetryOptions,
    /// Failures since the budget was last full, since when, and bytes read since.
    attempts: u32,
    since: Option<Instant>,
    progress: u64,
    delays: ExponentialBackoff,
    met: Met,
    metrics: FlowMetrics,
    counts_as_s3: bool,
}

fn delays(options: RetryOptions) -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(options.first_delay)
        .with_max_delay(LONGEST_DELAY)
        .without_max_times()
        .build()
}

impl Budget {
    pub(crate) fn new(
        url: String,
        options: RetryOptions,
        metrics: FlowMetrics,
        met: Met,
        counts_as_s3: bool,
    ) -> Self {
        Self {
            url,
            options,
            attempts: 0,
            since: None,
            progress: 0,
            delays: delays(options),
            met,
            metrics,
            counts_as_s3,
        }
    }

    /// The server answered.
    pub(crate) fn contact(&mut self) {
        self.met.answered();
    }

    /// So many more bytes were read.
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

    /// Counts a repeated request that is nobody's fault and needs no waiting.
    pub(crate) fn excused(&self, reason: &'static str) {
        if self.counts_as_s3 {
            self.metrics.s3_retry(reason);
        }
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
        let started = *self.since.get_or_insert_with(Instant::now);
        let spent = self.attempts >= self.options.max_attempts;
        let url = self.url.clone();
        let (reason, cause) = match failure {
            Failure::Fatal(error) => return Err(error),
            Failure::Connect {
                cause,
                endpoint,
                hint,
            } if !self.met.has_answered() && (spent || self.attempts >= FIRST_CONTACT_ATTEMPTS) => {
                return Err(SourceError::Unreachable {
                    url,
                    endpoint,
                    attempts: self.attempts,
                    cause,
                    hint,
                });
            }
            Failure::Connect { cause, .. } => ("connect", cause),
            Failure::Passing { reason, cause } => (reason, cause),
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
        let met = Met::default();
        Budget::new("s3://b/k".into(), options, FlowMetrics::new(), met, true)
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

    #[tokio::test]
    async fn progress_gives_the_attempts_back() {
        let mut budget = budget(3);
        for _ in 0..20 {
            budget.failed(passing(), 0).await.unwrap();
            budget.failed(passing(), 0).await.unwrap();
            budget.progress(PROGRESS_BYTES as usize / 2);
            budget.progress(PROGRESS_BYTES as usize / 2);
        }
        // Steps too small don't, however many failures lie between them.
        budget.failed(passing(), 0).await.unwrap();
        budget.progress(1000);
        budget.failed(passing(), 0).await.unwrap();
        budget.progress(1000);
        let error = budget.failed(passing(), 0).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Exhausted { attempts: 3, .. }),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn a_server_met_by_one_reader_is_known_to_all() {
        let (mut first, mut second) = (budget(100), budget(100));
        second.met = first.met.clone();
        first.contact();
        for _ in 0..6 {
            second.failed(connect(), 0).await.unwrap();
        }
    }
}
