//! The recent work of the stages: the window that the limit in a progress line is read from.

use std::collections::VecDeque;

use super::clock::FlowMetrics;
use super::snapshot::FlowSnapshot;

/// Shortest window. Seconds.
const SPAN: f64 = 30.0;
/// Seconds between two marks that are kept.
const APART: f64 = 1.0;
/// Fewest marks in the window: a stage counts a wait when the wait ends and its work when an item is
/// done, so a window of a few items shows only some of the stages.
const FEWEST: usize = 8;

/// Marks set during a run, one at each batch or step; the window reaches from the oldest to the newest.
///
/// The first batch sets the first mark: filling an empty pipeline says nothing about the limit.
#[derive(Debug, Default)]
pub struct Recent {
    first: Option<FlowSnapshot>,
    marks: VecDeque<FlowSnapshot>,
    window: Option<FlowSnapshot>,
}

impl Recent {
    /// Records that a batch or step is done; returns the window up to now, `None` for the first mark.
    pub fn mark(&mut self, metrics: &FlowMetrics) -> Option<&FlowSnapshot> {
        self.mark_at(metrics.snapshot())
    }

    fn mark_at(&mut self, now: FlowSnapshot) -> Option<&FlowSnapshot> {
        while self.marks.len() > FEWEST
            && self
                .marks
                .get(1)
                .is_some_and(|next| now.seconds - next.seconds >= SPAN)
        {
            self.marks.pop_front();
        }
        self.window = self.marks.front().map(|then| now.since(then));
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
        self.window.as_ref()
    }

    /// Whether there was a first mark.
    #[must_use]
    pub fn started(&self) -> bool {
        self.first.is_some()
    }

    /// The difference between the oldest mark of the window and the newest.
    #[must_use]
    pub fn window(&self) -> Option<&FlowSnapshot> {
        self.window.as_ref()
    }

    /// The difference between the oldest mark of the window and `now`.
    #[must_use]
    pub fn until(&self, now: &FlowSnapshot) -> Option<FlowSnapshot> {
        self.marks.front().map(|then| now.since(then))
    }

    /// The difference between the first mark and now.
    #[must_use]
    pub fn overall(&self, metrics: &FlowMetrics) -> Option<FlowSnapshot> {
        let first = self.first.as_ref()?;
        Some(metrics.snapshot().since(first))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::stages::Stage;

    /// A run with steps of one second, in which one stage works and the others wait.
    struct Clock {
        metrics: FlowMetrics,
        now: f64,
    }

    impl Clock {
        fn second(&mut self, busy: Stage) -> FlowSnapshot {
            for stage in [Stage::Fetch, Stage::Decode, Stage::Train] {
                let handle = self.metrics.stage(stage);
                if stage == busy {
                    handle.add_busy(Duration::from_secs(1));
                } else {
                    handle.add_busy(Duration::from_millis(1));
                    handle.add_starved(Duration::from_millis(999));
                }
            }
            self.now += 1.0;
            let mut snapshot = self.metrics.snapshot();
            snapshot.seconds = self.now;
            snapshot
        }
    }

    #[test]
    fn recent_limit_forgets_the_start() {
        let mut clock = Clock {
            metrics: FlowMetrics::new(),
            now: 0.0,
        };
        for _ in 0..100 {
            clock.second(Stage::Fetch);
        }
        let mut recent = Recent::default();
        let start = clock.second(Stage::Fetch);
        assert!(recent.mark_at(start).is_none());
        let mut limits = Vec::new();
        for _ in 0..50 {
            let now = clock.second(Stage::Decode);
            limits.push(recent.mark_at(now).and_then(FlowSnapshot::limiting_stage));
        }
        assert!(limits.iter().all(|limit| *limit == Some(Stage::Decode)));
        for _ in 0..20 {
            let now = clock.second(Stage::Train);
            limits.push(recent.mark_at(now).and_then(FlowSnapshot::limiting_stage));
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
