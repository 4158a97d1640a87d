//! MPI as a [`Collective`].

use std::time::Duration;

use super::Mpi;
use crate::ranks::{Collective, Rank, RanksError};

impl Collective for Mpi {
    fn rank(&self) -> Rank {
        Rank {
            index: self.rank(),
            world: self.world(),
        }
    }

    fn gather(&self, message: &[u8], limit: Duration) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        Ok(self.gather(message, limit)?)
    }

    fn broadcast(&self, message: Vec<u8>, limit: Duration) -> Result<Vec<u8>, RanksError> {
        Ok(self.broadcast(message, limit)?)
    }

    fn all_to_all(
        &self,
        rows: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), RanksError> {
        Ok(self.all_to_all(rows, received, limit)?)
    }

    fn all_gather(
        &self,
        segment: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), RanksError> {
        Ok(self.all_gather(segment, received, limit)?)
    }

    fn abort(&self, code: u8) -> ! {
        self.abort(i32::from(code))
    }

    fn finish(&self, limit: Duration) -> Result<(), RanksError> {
        Ok(self.finish(limit)?)
    }
}
