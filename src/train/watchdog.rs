//! Ends a run that waits for data that doesn't come.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Watches waits; when one lasts for `timeout`, calls a hook once.
#[derive(Debug)]
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    begun: Instant,
}

/// No wait.
const RESTING: u64 = u64::MAX;

#[derive(Debug)]
struct Shared {
    /// When the wait began, in milliseconds since the watchdog was started; [`RESTING`] when nothing is waited for.
    since: AtomicU64,
    barked: AtomicBool,
    ended: Mutex<bool>,
    wake: Condvar,
}

impl Watchdog {
    pub(super) fn start(
        timeout: Duration,
        on_stall: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            since: AtomicU64::new(RESTING),
            barked: AtomicBool::new(false),
            ended: Mutex::new(false),
            wake: Condvar::new(),
        });
        let begun = Instant::now();
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(move || {
                let mut ended = watched.ended.lock().unwrap_or_else(PoisonError::into_inner);
                while !*ended {
                    let since = Duration::from_millis(watched.since.load(Ordering::Relaxed));
                    let deadline = since.saturating_add(timeout);
                    let Some(left) = deadline.checked_sub(begun.elapsed()) else {
                        watched.barked.store(true, Ordering::SeqCst);
                        on_stall();
                        return;
                    };
                    let woken = watched
                        .wake
                        .wait_timeout(ended, left.clamp(Duration::from_millis(1), timeout));
                    ended = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
            begun,
        })
    }

    /// A wait begins.
    pub(super) fn watch(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(RESTING);
        self.shared.since.store(now, Ordering::Relaxed);
    }

    /// The wait is over.
    pub(super) fn rest(&self) {
        self.shared.since.store(RESTING, Ordering::Relaxed);
    }

    /// Whether the hook was called.
    pub(super) fn barked(&self) -> bool {
        self.shared.barked.load(Ordering::SeqCst)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self
            .shared
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn barks_only_when_a_wait_is_long() {
        let barks = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&barks);
        let dog = Watchdog::start(Duration::from_millis(150), move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(30));
            dog.watch();
        }
        dog.rest();
        std::thread::sleep(Duration::from_millis(300));
        assert!(!dog.barked(), "nothing was waited for");
        dog.watch();
        std::thread::sleep(Duration::from_millis(400));
        assert!(dog.barked());
        assert_eq!(barks.load(Ordering::SeqCst), 1);
    }
}
