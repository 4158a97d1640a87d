//! The shards of one rank in the order they are read, epoch after epoch.

use serde::{Deserialize, Serialize};

use super::permutation::{EpochPlan, Order};

/// One reading of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Visit {
    /// Counts every shard this rank begins, from 0.
    pub(crate) id: u64,
    /// Index of the shard.
    pub(crate) shard: usize,
    pub(crate) epoch: u64,
}

/// A place in the schedule: the epoch, and how many of its shards came before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Turn {
    pub(crate) epoch: u64,
    pub(crate) index: usize,
}

/// Goes through the epochs' shards. [`Order::Sequential`] has one epoch, [`Order::Shuffled`] no end.
#[derive(Debug)]
pub(crate) struct Schedule {
    plan: EpochPlan,
    shards: Vec<usize>,
    next: Turn,
}

impl Schedule {
    /// A schedule that goes on at `next`.
    pub(crate) fn new(plan: EpochPlan, next: Turn) -> Self {
        Self {
            plan,
            shards: plan.shards(next.epoch),
            next,
        }
    }

    /// The next shard, as an index into the list, and its place.
    pub(crate) fn next(&mut self) -> Option<(Turn, usize)> {
        if self.next.index >= self.shards.len() {
            if self.plan.order == Order::Sequential {
                return None;
            }
            self.next = Turn {
                epoch: self.next.epoch + 1,
                index: 0,
            };
            self.shards = self.plan.shards(self.next.epoch);
        }
        let (turn, shard) = (self.next, *self.shards.get(self.next.index)?);
        self.next.index += 1;
        Some((turn, shard))
    }

    /// The place of what [`Self::next`] gives next.
    pub(crate) fn turn(&self) -> Turn {
        self.next
    }

    /// Drops what is left of `epoch`.
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
            rank: 0,
            world: 2,
            order,
            resample: false,
        }
    }

    #[test]
    fn it_goes_on_from_any_place() {
        let plan = plan(Order::Shuffled);
        let mut schedule = Schedule::new(plan, Turn::default());
        let all: Vec<_> = (0..10).filter_map(|_| schedule.next()).collect();
        let epochs: Vec<u64> = all.iter().map(|(turn, _)| turn.epoch).collect();
        assert_eq!(epochs, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]);
        for at in 0..9 {
            let mut first = Schedule::new(plan, Turn::default());
            for _ in 0..at {
                first.next();
            }
            let mut resumed = Schedule::new(plan, first.turn());
            assert_eq!(resumed.next(), Some(all[at]));
            assert_eq!(resumed.next(), Some(all[at + 1]));
        }
    }

    #[test]
    fn the_rest_of_an_epoch_can_be_left() {
        let mut schedule = Schedule::new(plan(Order::Shuffled), Turn::default());
        schedule.next();
        schedule.skip_rest_of(3);
        assert_eq!(schedule.turn(), Turn { epoch: 0, index: 1 });
        schedule.skip_rest_of(0);
        assert_eq!(schedule.next().unwrap().0, Turn { epoch: 1, index: 0 });
    }

    #[test]
    fn a_sequential_schedule_ends() {
        let mut schedule = Schedule::new(plan(Order::Sequential), Turn::default());
        let shards: Vec<_> = std::iter::from_fn(|| schedule.next())
            .map(|(_, shard)| shard)
            .collect();
        assert_eq!(shards, [0, 2, 4]);
    }
}
