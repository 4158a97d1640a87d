//! The limit of open files: raising it, waiting while it is reached, and its message.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rlimit::Resource;
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};

/// Longest wait until other files are closed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// Time without a failure after which a new wait begins.
const RECOVERED: Duration = Duration::from_secs(5);

/// Raises this process's limit of open files as far as the system lets it. A failure changes nothing: the limit stays.
pub fn raise_limit() {
    if let Ok((_, hard)) = Resource::NOFILE.get() {
        Resource::NOFILE.set(hard, hard).ok();
    }
}

/// Files that this process may have open at once.
#[must_use]
pub fn limit() -> u64 {
    Resource::NOFILE.get().map_or(u64::MAX, |(soft, _)| soft)
}

/// The error message where the limit is reached, with the remedy.
pub(crate) fn message() -> String {
    format!("too many open files (limit {}): raise `ulimit -n`", limit())
}

/// Whether a limit of open files, of this process or of the machine, caused an error.
#[must_use]
pub fn is_exhausted(error: &io::Error) -> bool {
    let codes = [Errno::MFILE, Errno::NFILE];
    match (error.raw_os_error(), error.get_ref()) {
        (Some(code), _) => codes.contains(&Errno::from_raw_os_error(code)),
        // tempfile keeps the code in its text alone.
        (None, Some(inner)) => {
            let text = inner.to_string();
            let named = |code: Errno| text.contains(&format!("(os error {})", code.raw_os_error()));
            is_cause_of(inner) || codes.into_iter().any(named)
        }
        (None, None) => false,
    }
}

/// Whether a limit of open files is among the causes of an error.
pub(crate) fn is_cause_of(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    causes.any(|error| error.downcast_ref().is_some_and(is_exhausted))
}

/// A wait until other files are closed.
#[derive(Debug)]
pub(crate) struct Wait {
    patience: Duration,
    /// Times of the first failure and of the newest one.
    failures: Option<(Instant, Instant)>,
}

impl Default for Wait {
    fn default() -> Self {
        Self {
            patience: PATIENCE,
            failures: None,
        }
    }
}

impl Wait {
    /// Time to wait after a failure at `now`; `None` when the patience is spent. The first wait of the process is announced.
    fn after_failure_at(&mut self, now: Instant) -> Option<Duration> {
        static WARNED: AtomicBool = AtomicBool::new(false);
        let first = match self.failures {
            Some((first, newest)) if now - newest < RECOVERED => first,
            _ => now,
        };
        self.failures = Some((first, now));
        if now - first >= self.patience {
            return None;
        }
        if !WARNED.swap(true, Ordering::Relaxed) {
            tracing::warn!("{}; waiting until some are closed", message());
        }
        Some(PAUSE)
    }

    /// Time to wait after a failure; `None` when the patience is spent.
    pub(crate) fn after_failure(&mut self) -> Option<Duration> {
        self.after_failure_at(Instant::now())
    }
}

/// Opens a file or a folder, and tries again for a minute while too many are open.
///
/// # Errors
/// The error of `open`; a limit that lasts is named with its remedy.
pub fn retry<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut wait = Wait::default();
    loop {
        match open() {
            Err(error) if is_exhausted(&error) => match wait.after_failure() {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(io::Error::other(message())),
            },
            opened => return opened,
        }
    }
}

/// As [`retry`], on the runtime.
pub(crate) async fn retry_async<T, F>(mut open: impl FnMut() -> F + Send) -> io::Result<T>
where
    T: Send,
    F: Future<Output = io::Result<T>> + Send,
{
    let mut wait = Wait::default();
    loop {
        match open().await {
            Err(error) if is_exhausted(&error) => match wait.after_failure() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(io::Error::other(message())),
            },
            opened => return opened,
        }
    }
}

/// The next connection of a listener. Waits after each error, such as too many open files: it would come again at once.
pub async fn accept(listener: &TcpListener) -> TcpStream {
    let mut wait = Wait::default();
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return socket,
            Err(error) if is_exhausted(&error) => {
                wait.after_failure();
            }
            Err(error) => tracing::debug!(%error, "a connection was not accepted"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exhausted() -> io::Error {
        io::Error::from_raw_os_error(Errno::MFILE.raw_os_error())
    }

    #[test]
    fn exhausted_limit_is_found_in_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);

        assert!(is_cause_of(&Outer(exhausted())));
        assert!(is_cause_of(&Outer(io::Error::other(Outer(exhausted())))));
        let named = io::Error::other(format!("{} at path /x", exhausted()));
        assert!(is_exhausted(&named));
        let full = io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
        assert!(!is_cause_of(&Outer(full)));
        assert!(!is_exhausted(&io::ErrorKind::NotFound.into()));
    }

    #[test]
    fn retry_opens_when_the_limit_is_no_longer_reached() {
        let mut attempts = 0;
        let opened = retry(|| {
            attempts += 1;
            if attempts < 3 {
                Err(exhausted())
            } else {
                Ok(attempts)
            }
        });
        assert_eq!(opened.unwrap(), 3);
        let missing = retry(|| Err::<(), _>(io::ErrorKind::NotFound.into()));
        assert_eq!(missing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn wait_ends_with_its_patience_and_begins_anew_after_success() {
        let mut wait = Wait::default();
        let start = Instant::now();
        let mut at = start;
        while at < start + PATIENCE {
            assert!(wait.after_failure_at(at).is_some());
            at += Duration::from_secs(4);
        }
        assert_eq!(wait.after_failure_at(at), None);
        at += RECOVERED;
        assert!(wait.after_failure_at(at).is_some());
    }
}
