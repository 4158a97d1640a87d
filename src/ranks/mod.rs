//! The processes of one job: which one this is, which lanes it reads, and how all of them agree.
//!
//! A [`Collective`] carries bytes and numbers between the ranks and adds nothing: the sums are formed here, in an order of their own, so
//! that no library decides how a gradient is rounded.

mod error;
mod job;
mod lanes;
mod launcher;
mod mpi;
mod reduce;
mod tree;

use std::fmt;
use std::time::Duration;

pub use error::RanksError;
pub use job::{Job, JobOptions};
pub use lanes::LanesError;
pub use launcher::{LauncherError, RankOrigin, from_environment};
pub use mpi::{Mpi, MpiError};
pub use reduce::{SumError, sum_over_ranks};
pub use tree::TreeSum;

/// This process among those of one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rank {
    /// Number of this process, from 0.
    pub index: usize,
    /// Number of processes.
    pub world: usize,
}

impl Rank {
    /// The only process of its job.
    pub const SOLO: Self = Self { index: 0, world: 1 };

    /// Rank `index` of `world`; `None` unless `index < world`.
    pub fn new(index: usize, world: usize) -> Option<Self> {
        (index < world).then_some(Self { index, world })
    }

    /// Whether this is rank 0, which alone writes the output of a run.
    pub fn leads(self) -> bool {
        self.index == 0
    }
}

/// Messages between the ranks of a job. Every rank calls the same operations in the same order; after an error the job can only be
/// aborted. A limit is the time without data from other ranks after which an operation fails, naming them.
pub trait Collective: fmt::Debug {
    /// This process.
    fn rank(&self) -> Rank;

    /// Sends every rank's message to rank 0, which gets them in rank order; `None` elsewhere.
    ///
    /// # Errors
    /// When a rank does not answer, or the transport fails.
    fn gather(&self, message: &[u8], limit: Duration) -> Result<Option<Vec<Vec<u8>>>, RanksError>;

    /// Sends rank 0's message to every rank; the argument of the others is ignored.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn broadcast(&self, message: Vec<u8>, limit: Duration) -> Result<Vec<u8>, RanksError>;

    /// Sends row r of `rows`, of equal length, to rank r; row r of `received` comes from rank r.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn all_to_all(
        &self,
        rows: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), RanksError>;

    /// Sends `segment` to every rank; segment r of `received` comes from rank r.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn all_gather(
        &self,
        segment: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), RanksError>;

    /// Ends all ranks and this process with an exit code.
    fn abort(&self, code: u8) -> !;

    /// Ends the job after all ranks have called this.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn finish(&self, limit: Duration) -> Result<(), RanksError>;
}

/// A job of one process.
#[derive(Clone, Copy, Debug)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> Rank {
        Rank::SOLO
    }

    fn gather(&self, message: &[u8], _: Duration) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        Ok(Some(vec![message.to_vec()]))
    }

    fn broadcast(&self, message: Vec<u8>, _: Duration) -> Result<Vec<u8>, RanksError> {
        Ok(message)
    }

    fn all_to_all(
        &self,
        rows: &mut Vec<f32>,
        received: &mut Vec<f32>,
        _: Duration,
    ) -> Result<(), RanksError> {
        received.clone_from(rows);
        Ok(())
    }

    fn all_gather(
        &self,
        segment: &mut Vec<f32>,
        received: &mut Vec<f32>,
        _: Duration,
    ) -> Result<(), RanksError> {
        received.clone_from(segment);
        Ok(())
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(i32::from(code))
    }

    fn finish(&self, _: Duration) -> Result<(), RanksError> {
        Ok(())
    }
}
