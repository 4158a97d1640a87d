//! The limit of the last while, for a line that is read now.

use std::collections::VecDeque;

use super::metrics::{FlowMetrics, Stage};
use super::snapshot::FlowSnapshot;

/// Seconds looked back over, at least.
const SPAN: f64 = 30.0;
/// Seconds between two marks that are kept.
const APART: f64 = 1.0;
/// Marks looked back over, at least: a stage accounts a wait when it ends, and what it did when an
/// item is done, so a look over less than a few items sees only some of the stages.
const FEWEST: usize = 8;

/// Marks set as a run goes on, one at each batch or step, to look back from.
///
/// The first batch sets the first mark: filling an empty pipeline says nothing of what limits it.
#[derive(Debug, Default)]
pub struct Recent {
    first: Option<FlowSnapshot>,
    marks: VecDeque<FlowSnapshot>,
    /// What the limit was last read from.
    window: Option<FlowSnapshot>,
}

impl Recent {
    /// A batch or step is done. The stage that held the rest back lately; `None` for the first.
    pub fn mark(&mut self, metrics: &FlowMetrics) -> Option<Stage> {
        self.mark_at(metrics.snapshot())
    }

    fn mark_at(&mut self, now: FlowSnapshot) -> Option<Stage> {
        while self.marks.len() > FEWEST
            && self
                .marks
                .get(1)
                .is_some_and(|next| now.seconds - next.seconds >= SPAN)
        {
            self.marks.pop_front();
        }
        self.window = self.marks.front().map(|then| now.since(then));
        let limit = self.limit();
        if self.first.is_none() {
            self.first = Some(now.clone());
        }
        if self
            .marks
            .back()
            .is_none_or(|last| now.seconds - last.seconds >= APART)
        {
            self.marks.push_back(now);
        }
        limit
    }

    /// Whether there was a first mark.
    #[must_use]
    pub fn started(&self) -> bool {
        self.first.is_some()
    }

    /// The stage that held the rest back lately, as of the newest mark.
    #[must_use]
    pub fn limit(&self) -> Option<Stage> {
        self.window.as_ref()?.limiting_stage()
    }

    /// What the limit is read from: what came to pass between the oldest mark looked back to and the newest one.
    #[must_use]
    pub fn window(&self) -> Option<&FlowSnapshot> {
        self.window.as_ref()
    }

    /// What came to pass since the oldest mark looked back to, up to `now`.
    #[must_use]
    pub fn until(&self, now: &FlowSnapshot) -> Option<FlowSnapshot> {
        self.marks.front().map(|then| now.since(then))
    }

    /// What came to pass since the first mark.
    #[must_use]
    pub fn overall(&self, metrics: &FlowMetrics) -> Option<FlowSnapshot> {
        let first = self.first.as_ref()?;
        Some(metrics.snapshot().since(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A run of a second a step, in which one stage works and the others wait.
    struct Clock {
        metrics: FlowMetrics,
        now: f64,
    }

    impl Clock {
        fn second(&mut self, busy: Stage) -> FlowSnapshot {
            for stage in [Stage::Fetch, Stage::Decode, Stage::Train] {
                let handle = self.metrics.stage(stage);
                match stage == busy {
                    true => handle.add_busy(Duration::from_secs(1)),
                    false => {
                        handle.add_busy(Duration::from_millis(1));
                        handle.add_starved(Duration::from_millis(999));
                    }
                }
            }
            self.now += 1.0;
            let mut snapshot = self.metrics.snapshot();
            snapshot.seconds = self.now;
            snapshot
        }
    }

    #[test]
    fn the_limit_of_now_is_not_that_of_the_start() {
        let mut clock = Clock {
            metrics: FlowMetrics::new(),
            now: 0.0,
        };
        for _ in 0..100 {
            clock.second(Stage::Fetch);
        }
        let mut recent = Recent::default();
        let start = clock.second(Stage::Fetch);
        assert_eq!(recent.mark_at(start), None);
        let mut limits = Vec::new();
        for _ in 0..50 {
            let now = clock.second(Stage::Decode);
            limits.push(recent.mark_at(now));
        }
        assert!(limits.iter().all(|limit| *limit == Some(Stage::Decode)));
        for _ in 0..20 {
            let now = clock.second(Stage::Train);
            limits.push(recent.mark_at(now));
        }
        assert_eq!(limits.last(), Some(&Some(Stage::Train)));
        let window = recent.window().unwrap();
        assert!((30.0..=31.0).contains(&window.seconds), "{window:?}");
        let mut later = clock.metrics.snapshot();
        later.seconds = clock.now + 5.0;
        let longer = recent.until(&later).unwrap();
        assert_eq!(longer.seconds, window.seconds + 5.0);
        let overall = recent.overall(&clock.metrics).unwrap();
        assert_eq!(overall.limiting_stage(), Some(Stage::Decode));
        assert!(recent.marks.len() <= 32, "{}", recent.marks.len());
    }
}
