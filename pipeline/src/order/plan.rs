//! The plan of an epoch: which shards a lane reads, and in which order.

use serde::{Deserialize, Serialize};

use super::rng::{index_below, rng};

/// Order of the samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// For training: endless epochs, shards permuted anew in each (or drawn with replacement),
    /// several read at once and interleaved, then a shuffle buffer.
    #[default]
    Shuffled,
    /// For reading everything once: this lane's shards in the given order, one after the other, samples in
    /// the shard's order.
    Sequential,
}

/// One lane's share of an epoch.
#[derive(Debug, Clone, Copy)]
pub struct EpochPlan {
    /// The run's seed.
    pub seed: u64,
    /// Shards in all.
    pub shards: usize,
    /// The lane, below `lanes`.
    pub lane: usize,
    /// Lanes that share the shards.
    pub lanes: usize,
    /// Order of the shards.
    pub order: Order,
    /// Draw shards with replacement instead of each once. Shuffled order only.
    pub resample: bool,
}

impl EpochPlan {
    /// The shards (indices into the list) this lane reads in `epoch`, in order.
    ///
    /// Shard `i` of the epoch's order goes to lane `i % lanes`: over all lanes every shard is read
    /// once (without resampling), by one lane.
    #[must_use]
    pub fn shards(&self, epoch: u64) -> Vec<usize> {
        let mut all: Vec<usize> = match (self.order, self.resample) {
            (Order::Sequential, _) => (0..self.shards).collect(),
            (Order::Shuffled, false) => {
                let mut rng = rng(self.seed, "shard permutation", epoch, 0);
                let mut all: Vec<usize> = (0..self.shards).collect();
                for last in (1..all.len()).rev() {
                    all.swap(last, index_below(&mut rng, last + 1));
                }
                all
            }
            (Order::Shuffled, true) => {
                let mut rng = rng(self.seed, "shard resampling", epoch, 0);
                (0..self.shards)
                    .map(|_| index_below(&mut rng, self.shards))
                    .collect()
            }
        };
        let mut index = 0;
        all.retain(|_| {
            let mine = index % self.lanes == self.lane;
            index += 1;
            mine
        });
        all
    }

    /// The shards that this lane does not read in `epoch`, in the given order.
    pub(crate) fn shards_without(&self, epoch: u64) -> Vec<usize> {
        let mut read = vec![false; self.shards];
        for shard in self.shards(epoch) {
            read[shard] = true;
        }
        (0..self.shards).filter(|&shard| !read[shard]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(lane: usize, lanes: usize) -> EpochPlan {
        EpochPlan {
            seed: 7,
            shards: 23,
            lane,
            lanes,
            order: Order::Shuffled,
            resample: false,
        }
    }

    #[test]
    fn plan_shares_an_epoch_between_lanes() {
        for lanes in [1, 2, 5, 23] {
            for epoch in 0..3 {
                let mut all: Vec<usize> = (0..lanes)
                    .flat_map(|lane| plan(lane, lanes).shards(epoch))
                    .collect();
                all.sort_unstable();
                assert_eq!(all, (0..23).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_repeat() {
        let a = plan(0, 1);
        assert_eq!(a.shards(4), a.shards(4));
        assert_ne!(a.shards(0), a.shards(1));
        assert_ne!(a.shards(0), EpochPlan { seed: 8, ..a }.shards(0));
    }

    #[test]
    fn plan_keeps_the_given_order_when_sequential() {
        let plan = EpochPlan {
            order: Order::Sequential,
            ..plan(1, 4)
        };
        assert_eq!(plan.shards(0), [1, 5, 9, 13, 17, 21]);
        assert_eq!(plan.shards(9), plan.shards(0));
    }

    #[test]
    fn plan_resamples_with_replacement() {
        let plan = EpochPlan {
            resample: true,
            ..plan(0, 1)
        };
        let drawn = plan.shards(0);
        let distinct: std::collections::BTreeSet<_> = drawn.iter().collect();
        assert_eq!(drawn.len(), 23);
        assert!(distinct.len() < 23);
    }

    #[test]
    fn plan_complements_an_epoch() {
        for (resample, lanes) in [(true, 1), (true, 3), (false, 1), (false, 3)] {
            let plan = EpochPlan {
                resample,
                ..plan(0, lanes)
            };
            let mut all = [plan.shards(5), plan.shards_without(5)].concat();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all, (0..23).collect::<Vec<_>>());
            assert!(
                plan.shards_without(5)
                    .iter()
                    .all(|shard| !plan.shards(5).contains(shard))
            );
        }
    }
}
