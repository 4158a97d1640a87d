//! Which lanes of a run each rank reads.

use coffey_pipeline::counted;
use coffey_pipeline::order::Lanes;

use super::Rank;

/// Lanes that can't be shared between the ranks of a job; the message says which numbers of ranks can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LanesError(String);

impl Rank {
    /// The lanes of this rank among `count`: a contiguous block, as large as that of every other rank.
    ///
    /// # Errors
    /// When the number of ranks does not divide `count`.
    pub fn lanes(self, count: usize, batches_in_turn: usize) -> Result<Lanes, LanesError> {
        let Self { index, world } = self;
        if count.is_multiple_of(world) {
            let each = count / world;
            return Ok(Lanes {
                count,
                hosted: index * each..(index + 1) * each,
                batches_in_turn,
            });
        }
        let fitting = (1..=count).filter(|&ranks| count.is_multiple_of(ranks));
        let below = fitting.clone().rfind(|&ranks| ranks < world);
        let above = fitting.clone().find(|&ranks| ranks > world);
        let nearest: Vec<String> = [below, above]
            .iter()
            .flatten()
            .map(ToString::to_string)
            .collect();
        let remedy = if count < world {
            format!(
                "for {world} ranks, set train.gradient_accumulation to a multiple of {0} and data.lanes to {0} (a smaller train.batch_size \
                 keeps the samples of a step)",
                world.next_power_of_two()
            )
        } else {
            "data.lanes is a power of two".to_owned()
        };
        Err(LanesError(format!(
            "{world} ranks can't share {}: start {}; {remedy}",
            counted(count, "lane"),
            match nearest.as_slice() {
                [one] if one == "1" => "1 rank".to_owned(),
                several => format!("{} ranks", several.join(" or ")),
            }
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_host_blocks_of_lanes() {
        let hosted = |index, world, count| {
            let rank = Rank::new(index, world).unwrap();
            rank.lanes(count, 1).map(|lanes| lanes.hosted)
        };
        assert_eq!(hosted(0, 1, 4), Ok(0..4));
        assert_eq!(hosted(1, 2, 4), Ok(2..4));
        assert_eq!(hosted(3, 4, 4), Ok(3..4));
        let refused = |world, count| hosted(0, world, count).unwrap_err().to_string();
        assert!(
            refused(3, 8).contains("start 2 or 4 ranks"),
            "{}",
            refused(3, 8)
        );
        let too_many = refused(3, 1);
        assert!(
            too_many.contains("1 lane:") && too_many.contains("multiple of 4"),
            "{too_many}"
        );
    }
}
