//! Retries of requests to the Hub: exponential back-off with jitter, ended early by a stop.

use std::time::{Duration, Instant};

use backon::{BlockingRetryable as _, ExponentialBuilder};

use tokio_util::sync::CancellationToken;

/// Attempts at one request.
pub(crate) const MAX_ATTEMPTS: u32 = 5;
/// Shortest delay before the second attempt; it doubles with each attempt.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// Upper limit of a `Retry-After`.
const MAX_DELAY: Duration = Duration::from_secs(60);
/// Time between two checks for a stop during a delay.
const STOP_INTERVAL: Duration = Duration::from_millis(20);

/// How an attempt failed.
#[derive(Debug)]
pub(crate) enum AttemptError<E> {
    /// A retry can't succeed.
    Permanent(E),
    /// A retry may succeed.
    Transient {
        cause: String,
        /// Delay that the server asked for.
        retry_after: Option<Duration>,
    },
}

impl<E> AttemptError<E> {
    pub(crate) fn transient(cause: impl ToString) -> Self {
        Self::Transient {
            cause: cause.to_string(),
            retry_after: None,
        }
    }
}

/// Calls `attempt` until it succeeds or fails permanently, at most [`MAX_ATTEMPTS`] times; `exhausted` makes the error from the
/// last cause. A stop ends a delay: `attempt` is called once more and should return at once.
pub(crate) fn retry<T, E>(
    stop: &CancellationToken,
    attempt: impl FnMut() -> Result<T, AttemptError<E>>,
    exhausted: impl FnOnce(String) -> E,
) -> Result<T, E> {
    let schedule = ExponentialBuilder::new()
        .with_min_delay(FIRST_DELAY)
        .with_max_times(MAX_ATTEMPTS as usize - 1)
        .with_jitter();
    let result = attempt
        .retry(schedule)
        .when(|error| matches!(error, AttemptError::Transient { .. }))
        // `notify` waits instead of the sleeper, which is not given the error and its `Retry-After`.
        .sleep(|_: Duration| ())
        .notify(|error, delay| {
            let asked = match error {
                AttemptError::Transient { retry_after, .. } => *retry_after,
                AttemptError::Permanent(_) => None,
            };
            wait(asked.unwrap_or(delay).min(MAX_DELAY), stop);
        })
        .call();
    result.map_err(|error| match error {
        AttemptError::Permanent(error) => error,
        AttemptError::Transient { cause, .. } => exhausted(cause),
    })
}

fn wait(delay: Duration, stop: &CancellationToken) {
    let end = Instant::now() + delay;
    while !stop.is_cancelled() && Instant::now() < end {
        std::thread::sleep(STOP_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Result and number of calls of an `attempt` that fails `failures` times.
    fn retried(
        stop: &CancellationToken,
        failures: u32,
        error: impl Fn() -> AttemptError<String>,
    ) -> (Result<u32, String>, u32) {
        let mut calls = 0;
        let result = retry(
            stop,
            || {
                calls += 1;
                if calls <= failures {
                    return Err(error());
                }
                Ok(calls)
            },
            |cause| format!("exhausted: {cause}"),
        );
        (result, calls)
    }

    fn transient() -> AttemptError<String> {
        AttemptError::Transient {
            cause: "HTTP 503".to_owned(),
            retry_after: Some(Duration::ZERO),
        }
    }

    #[test]
    fn transient_errors_are_retried_five_times() {
        let stop = CancellationToken::new();
        assert_eq!(retried(&stop, 4, transient), (Ok(5), 5));
        let exhausted = Err("exhausted: HTTP 503".to_owned());
        assert_eq!(retried(&stop, 5, transient), (exhausted, MAX_ATTEMPTS));
    }

    #[test]
    fn permanent_errors_are_not_retried() {
        let permanent = || AttemptError::Permanent("HTTP 404".to_owned());
        let failed = Err("HTTP 404".to_owned());
        assert_eq!(
            retried(&CancellationToken::default(), 1, permanent),
            (failed, 1)
        );
    }

    #[test]
    fn delays_end_at_a_stop() {
        let stop = CancellationToken::new();
        stop.cancel();
        let hour = || AttemptError::Transient {
            cause: String::new(),
            retry_after: Some(Duration::from_secs(3600)),
        };
        let begun = Instant::now();
        assert_eq!(retried(&stop, 1, hour), (Ok(2), 2));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}
