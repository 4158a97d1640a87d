//! Lanes: the independent sequences that a stream is made of.

use std::ops::Range;

/// Number of lanes of a stream, and those that this process reads.
///
/// A lane is a sequence of batches that depends on no other lane: it has its own shards of each epoch, its own open shards and its own
/// shuffle buffer. The stream takes batches from its lanes in turn: `batches_in_turn` of lane 0, as many of lane 1, and so on, and
/// again from lane 0. Such a *round* is one training step. The number of lanes is part of the order; which process reads which lanes
/// is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lanes {
    /// Lanes that share the shards, at least 1.
    pub count: usize,
    /// The lanes that this process reads, at least one.
    pub hosted: Range<usize>,
    /// Batches that are taken from a lane before it is the next lane's turn, at least 1.
    pub batches_in_turn: usize,
}

impl Lanes {
    /// Lane `index` of `count` alone.
    #[must_use]
    pub const fn one(index: usize, count: usize) -> Self {
        Self {
            count,
            hosted: index..index + 1,
            batches_in_turn: 1,
        }
    }

    /// `count` lanes, all in this process.
    #[must_use]
    pub const fn all(count: usize, batches_in_turn: usize) -> Self {
        Self {
            count,
            hosted: 0..count,
            batches_in_turn,
        }
    }

    /// Batches of a round of the hosted lanes.
    #[must_use]
    pub(crate) const fn batches_in_round(&self) -> usize {
        (self.hosted.end - self.hosted.start) * self.batches_in_turn
    }

    /// Lane `lane`'s share of a total: the lanes before the rest have one more.
    #[must_use]
    pub const fn share(&self, lane: usize, total: u64) -> u64 {
        let (lane, count) = (lane as u64, self.count as u64);
        total / count + (lane < total % count) as u64
    }

    /// Each lane's part of a total that is rounded up, so that no lane has 0 of it.
    pub(crate) const fn part(&self, total: u64) -> u64 {
        total.div_ceil(self.count as u64)
    }
}

/// All of a stream in one lane.
impl Default for Lanes {
    fn default() -> Self {
        Self::one(0, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_a_total() {
        let lanes = Lanes::all(4, 1);
        let shares: Vec<u64> = (0..4).map(|lane| lanes.share(lane, 11)).collect();
        assert_eq!(shares, [3, 3, 3, 2]);
        assert_eq!([0, 1, 4, 5].map(|total| lanes.part(total)), [0, 1, 1, 2]);
    }
}
