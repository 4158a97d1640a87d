//! The shards of one lane in the order they are read, epoch after epoch.

use serde::{Deserialize, Serialize};

use super::plan::{EpochPlan, Order};

/// One pass over one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShardPass {
    /// Counts the shards that this lane begins, from 0.
    pub(crate) id: u64,
    /// Index of the shard.
    pub(crate) shard: usize,
    pub(crate) epoch: u64,
}

/// A position in the schedule: the epoch, and how many of the epoch's shards came before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct SchedulePosition {
    pub(crate) epoch: u64,
    pub(crate) index: usize,
}

/// Iterates over the shards of all epochs. [`Order::Sequential`] has one epoch, [`Order::Shuffled`] never ends.
#[derive(Debug)]
pub(crate) struct ShardSchedule {
    plan: EpochPlan,
    shards: Vec<usize>,
    next: SchedulePosition,
    /// The epoch that reads the shards that the epoch before it did not read, if there is one.
    complement: Option<u64>,
}

impl ShardSchedule {
    /// A schedule that continues at `next`. `complement` is that of [`ShardSchedule::complement`].
    pub(crate) fn new(plan: EpochPlan, next: SchedulePosition, complement: Option<u64>) -> Self {
        let mut schedule = Self {
            plan,
            shards: Vec::new(),
            next,
            complement,
        };
        schedule.shards = schedule.shards_of(next.epoch);
        schedule
    }

    fn shards_of(&self, epoch: u64) -> Vec<usize> {
        match epoch.checked_sub(1) {
            Some(before) if self.complement == Some(epoch) => self.plan.shards_without(before),
            _ => self.plan.shards(epoch),
        }
    }

    /// Continues after `epoch` with an epoch of the shards that `epoch` did not read. Returns the number of these shards.
    pub(crate) fn complete(&mut self, epoch: u64) -> usize {
        let next = epoch + 1;
        self.complement = Some(next);
        self.next = SchedulePosition {
            epoch: next,
            index: 0,
        };
        self.shards = self.shards_of(next);
        self.shards.len()
    }

    /// The last epoch that [`ShardSchedule::complete`] made.
    pub(crate) fn complement(&self) -> Option<u64> {
        self.complement
    }

    /// The next shard: its position in the schedule and its index in the list of shards.
    pub(crate) fn next(&mut self) -> Option<(SchedulePosition, usize)> {
        if self.next.index >= self.shards.len() {
            if self.plan.order == Order::Sequential {
                return None;
            }
            self.next = SchedulePosition {
                epoch: self.next.epoch + 1,
                index: 0,
            };
            self.shards = self.shards_of(self.next.epoch);
        }
        let (position, shard) = (self.next, *self.shards.get(self.next.index)?);
        self.next.index += 1;
        Some((position, shard))
    }

    /// Position of the shard that [`Self::next`] returns next.
    pub(crate) fn position(&self) -> SchedulePosition {
        self.next
    }

    /// Skips the remaining shards of `epoch`.
    pub(crate) fn skip_rest_of(&mut self, epoch: u64) {
        if self.next.epoch == epoch {
            self.next.index = self.shards.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(order: Order) -> EpochPlan {
        EpochPlan {
            seed: 7,
            shards: 5,
            lane: 0,
            lanes: 2,
            order,
            resample: false,
        }
    }

    #[test]
    fn schedule_continues_from_any_position() {
        let plan = plan(Order::Shuffled);
        let mut schedule = ShardSchedule::new(plan, SchedulePosition::default(), None);
        let all: Vec<_> = (0..10).filter_map(|_| schedule.next()).collect();
        let epochs: Vec<u64> = all.iter().map(|(position, _)| position.epoch).collect();
        assert_eq!(epochs, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
        for at in 0..9 {
            let mut first = ShardSchedule::new(plan, SchedulePosition::default(), None);
            for _ in 0..at {
                first.next();
            }
            let mut resumed = ShardSchedule::new(plan, first.position(), None);
            assert_eq!(resumed.next(), Some(all[at]));
            assert_eq!(resumed.next(), Some(all[at + 1]));
        }
    }

    #[test]
    fn schedule_skips_the_rest_of_an_epoch() {
        let start = SchedulePosition::default();
        let mut schedule = ShardSchedule::new(plan(Order::Shuffled), start, None);
        schedule.next();
        schedule.skip_rest_of(3);
        assert_eq!(schedule.position(), SchedulePosition { epoch: 0, index: 1 });
        schedule.skip_rest_of(0);
        assert_eq!(
            schedule.next().unwrap().0,
            SchedulePosition { epoch: 1, index: 0 }
        );
    }

    #[test]
    fn schedule_completes_an_epoch_and_continues_from_any_position() {
        let plan = EpochPlan {
            resample: true,
            ..plan(Order::Shuffled)
        };
        let mut schedule = ShardSchedule::new(plan, SchedulePosition::default(), None);
        // A shard of the next epoch was opened ahead.
        for _ in 0..4 {
            schedule.next();
        }
        let rest = plan.shards_without(0);
        assert_eq!(schedule.complete(0), rest.len());
        let mut at = schedule.position();
        let expected = rest.into_iter().chain(plan.shards(2));
        for shard in expected {
            let complement = schedule.complement();
            let mut resumed = ShardSchedule::new(plan, at, complement);
            let next = schedule.next().unwrap();
            assert_eq!(next.1, shard);
            assert_eq!(resumed.next(), Some(next));
            at = schedule.position();
        }
        assert_eq!(at.epoch, 2);
    }

    #[test]
    fn schedule_ends_when_sequential() {
        let start = SchedulePosition::default();
        let mut schedule = ShardSchedule::new(plan(Order::Sequential), start, None);
        let shards: Vec<_> = std::iter::from_fn(|| schedule.next())
            .map(|(_, shard)| shard)
            .collect();
        assert_eq!(shards, [0, 2, 4]);
    }
}
