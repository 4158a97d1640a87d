//! The time left for work of a known size, by the mean speed of this process.

use std::time::{Duration, Instant};

/// Counts of work, total and done, with their times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) done: u64,
    pub(crate) total: u64,
    /// Time and count when this process completed its first unit.
    first: Option<(Instant, u64)>,
    newest: Instant,
}

impl Pace {
    /// `done` units were made before this process.
    pub(crate) fn new(done: u64, total: u64) -> Self {
        Self {
            done,
            total,
            first: None,
            newest: Instant::now(),
        }
    }

    /// Records how many units are done.
    pub(crate) fn advance(&mut self, done: u64) {
        self.advance_at(done, Instant::now());
    }

    fn advance_at(&mut self, done: u64, now: Instant) {
        if done > self.done {
            (self.done, self.newest) = (done, now);
            self.first.get_or_insert((now, done));
        }
    }

    /// Time left at the mean speed since the first unit of this process, which includes the time to fill the pipeline.
    pub(crate) fn left(&self, now: Instant) -> Option<Duration> {
        let (begun, before) = self.first?;
        let made = self.done.checked_sub(before).filter(|made| *made > 0)?;
        let each = (self.newest - begun).as_secs_f64() / made as f64;
        let left = each * self.total.saturating_sub(self.done) as f64;
        let waited = (now - self.newest).as_secs_f64();
        Duration::try_from_secs_f64((left - waited).max(0.0)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_estimated_from_this_process() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(100, 200);
        let first = Instant::now() + second;
        assert_eq!(pace.left(first), None, "nothing is done yet");
        pace.advance_at(101, first);
        assert_eq!(pace.left(first), None, "the first one filled the pipeline");
        pace.advance_at(111, first + 20 * second);
        pace.advance_at(111, first + 40 * second);
        assert_eq!(pace.left(pace.newest), Some(178 * second));
        assert_eq!(pace.left(pace.newest + second), Some(177 * second));
        assert_eq!(pace.left(pace.newest + 1000 * second), Some(Duration::ZERO));
    }
}
