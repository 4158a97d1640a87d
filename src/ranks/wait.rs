//! How a rank waits: polls at once while data moves, then sleeps, so that its core is free for the decode threads.

use std::thread;
use std::time::{Duration, Instant};

/// Time without data for which the polls follow each other without a sleep.
const SPIN: Duration = Duration::from_millis(2);
/// The first sleep; each next one is twice as long.
const SHORTEST: Duration = Duration::from_micros(20);
/// The longest sleep between two polls.
const LONGEST: Duration = Duration::from_micros(500);
/// The most that one poll and its sleep can count as waiting time. A longer gap means that this process stood still:
/// it was stopped, or the whole job was suspended, and the other ranks are not at fault.
const GAP: Duration = Duration::from_millis(100);

/// The time since the last data, and the next sleep.
#[derive(Debug)]
pub(super) struct Silence {
    waited: Duration,
    last: Instant,
    sleep: Duration,
}

impl Silence {
    /// Starts now.
    pub(super) fn new() -> Self {
        Self {
            waited: Duration::ZERO,
            last: Instant::now(),
            sleep: SHORTEST,
        }
    }

    /// Data moved: starts again.
    pub(super) fn end(&mut self) {
        *self = Self::new();
    }

    /// Gives the core away until the next poll. Returns the time since the last data.
    pub(super) fn pause(&mut self) -> Duration {
        if self.waited < SPIN {
            thread::yield_now();
        } else {
            thread::sleep(self.sleep);
            self.sleep = (self.sleep * 2).min(LONGEST);
        }
        self.look()
    }

    /// The time since the last data, without a pause.
    pub(super) fn look(&mut self) -> Duration {
        let now = Instant::now();
        self.count(now - self.last);
        self.last = now;
        self.waited
    }

    fn count(&mut self, gap: Duration) {
        self.waited += gap.min(GAP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_grow_to_the_longest_and_start_again_with_data() {
        let mut silence = Silence::new();
        while silence.pause() < SPIN + 20 * LONGEST {}
        assert_eq!(silence.sleep, LONGEST);
        silence.end();
        assert_eq!(silence.sleep, SHORTEST);
        assert_eq!(silence.waited, Duration::ZERO);
    }

    #[test]
    fn time_in_which_this_process_stood_still_is_not_counted() {
        let mut silence = Silence::new();
        silence.count(Duration::from_secs(3600));
        silence.count(Duration::from_millis(1));
        assert_eq!(silence.waited, GAP + Duration::from_millis(1));
    }
}
