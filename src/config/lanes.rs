//! `data.lanes`: into how many lanes a run's stream is divided.

use super::limits::Limits;
use super::{Config, ConfigError};

/// Most lanes by default: each doubling holds the gradients of the trained variables once more on one process.
const MOST_BY_DEFAULT: usize = 8;

impl Config {
    /// Lanes of a new run over `shards` shards: `data.lanes`; unset, the greatest power of two that divides
    /// `train.gradient_accumulation`, at most 8 and at most the number of shards.
    #[must_use]
    pub fn lanes(&self, shards: usize) -> usize {
        self.data.lanes.unwrap_or_else(|| {
            let accumulation = self.train.gradient_accumulation;
            let halvings = accumulation.trailing_zeros().min(usize::BITS - 1);
            let most = MOST_BY_DEFAULT.min(shards.max(1));
            (1 << halvings).min(1 << most.ilog2())
        })
    }

    /// Micro-batches of a step in each of `lanes` lanes, at least 1.
    #[must_use]
    pub fn batches_in_turn(&self, lanes: usize) -> usize {
        (self.train.gradient_accumulation / lanes).max(1)
    }

    pub(super) fn check_lanes(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let Some(lanes) = self.data.lanes else {
            return Ok(());
        };
        let accumulation = self.train.gradient_accumulation;
        let ok = lanes.is_power_of_two() && accumulation.is_multiple_of(lanes);
        let needs = format!(
            "must be a power of two that divides train.gradient_accumulation = {accumulation}, whose micro-batches the lanes share"
        );
        limits.check("data.lanes", lanes, ok, &needs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_follow_gradient_accumulation() {
        let mut config = Config::parse(
            "[data]\nshards = \"a.tar\"\n[train]\noutput = \"runs\"\n",
            "test",
            &[],
        )
        .unwrap();
        let mut lanes = |accumulation, shards| {
            config.train.gradient_accumulation = accumulation;
            config.lanes(shards)
        };
        assert_eq!(
            [1, 2, 3, 4, 6, 12].map(|n| lanes(n, 100)),
            [1, 2, 1, 4, 2, 4]
        );
        assert_eq!([1 << 16, 64].map(|n| lanes(n, 100)), [8, 8]);
        assert_eq!(
            [1, 2, 3, 7, 8].map(|shards| lanes(8, shards)),
            [1, 2, 2, 4, 8]
        );
    }
}
