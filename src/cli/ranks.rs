//! `--rank` and `--world`.

use clap::Args;
use coffey_pipeline::counted;

use super::Failure;
use super::numbers::{MAX_WORLD, whole};
use crate::ranks::{Rank, RankOrigin, from_environment};

/// `--rank` and `--world`; without them the launcher's environment decides.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct RankArgs {
    /// Which of the processes that share the shards this is, from 0; without it, what the scheduler says.
    #[arg(long, value_name = "R", requires = "world", allow_negative_numbers = true, value_parser = whole(0..=MAX_WORLD - 1))]
    rank: Option<usize>,
    /// How many processes share the shards.
    #[arg(long, value_name = "W", requires = "rank", allow_negative_numbers = true, value_parser = whole(1..=MAX_WORLD))]
    world: Option<usize>,
}

impl RankArgs {
    /// The rank of this process, and what it was read from.
    pub(super) fn resolve(&self) -> Result<RankOrigin, Failure> {
        let found = match (self.rank, self.world) {
            (Some(rank), Some(world)) => RankOrigin::new(rank, world, "--rank and --world"),
            _ => from_environment(|name| std::env::var(name).ok()),
        };
        found.map_err(|error| Failure::Usage(error.into()))
    }
}

/// Refuses more ranks than shards.
pub(super) fn check_enough_shards(rank: Rank, shards: usize) -> Result<(), Failure> {
    let world = rank.world;
    if shards >= world {
        return Ok(());
    }
    let message = format!(
        "{} can't be shared between {world} ranks: every rank needs at least one; start at most {}, or cut the data into more shards",
        counted(shards, "shard"),
        counted(shards, "rank")
    );
    Err(Failure::Usage(message.into()))
}
