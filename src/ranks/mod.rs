//! The processes of one job: which one this is, which lanes it reads, and how all of them agree.
//!
//! A [`Collective`] carries bytes and tensors between the ranks and adds nothing: the sums are formed here, in an order of their own, so
//! that no library decides how a gradient is rounded. Each variable has one rank that holds its moments and updates it ([`Shares`]).

mod error;
mod job;
mod lanes;
mod launcher;
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
mod nccl_error;
mod reduce;
mod shares;
mod tcp;
mod tensors;
#[cfg(test)]
pub(crate) mod threads;
mod tree;
mod wait;
mod world;

use std::fmt;
use std::time::Duration;

use candle_core::Tensor;

pub use error::RanksError;
pub use job::{Job, JobOptions};
pub use lanes::LanesError;
pub use launcher::{LauncherError, RankOrigin, from_environment};
pub use mpi::MpiError;
pub use nccl_error::NcclError;
pub use reduce::{ExchangeError, send_own, sum_of_all, sum_of_own};
pub use shares::Shares;
pub use tcp::TcpError;
pub use tensors::{Outgoing, TensorForm};
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

/// How long an operation waits for other ranks before it fails, naming them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// This time without data of the operation.
    ForData(Duration),
    /// This time without any sign of life: a rank may do other work before its part of the operation.
    ForLife(Duration),
}

impl Patience {
    /// The time.
    pub fn limit(self) -> Duration {
        match self {
            Self::ForData(limit) | Self::ForLife(limit) => limit,
        }
    }
}

/// Messages between the ranks of a job. Every rank calls the same operations in the same order; after an error the job can only be
/// aborted.
pub trait Collective: fmt::Debug {
    /// This process.
    fn rank(&self) -> Rank;

    /// Sends every rank's message to rank 0, which gets them in rank order; `None` elsewhere.
    ///
    /// # Errors
    /// When a rank does not answer, or the transport fails.
    fn gather(
        &self,
        message: Vec<u8>,
        patience: Patience,
    ) -> Result<Option<Vec<Vec<u8>>>, RanksError>;

    /// Sends rank 0's message to every rank; the argument of the others is ignored.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn broadcast(&self, message: Vec<u8>, patience: Patience) -> Result<Vec<u8>, RanksError>;

    /// Sends tensors to all ranks and receives theirs: row r of the result comes from rank r and has the forms `expected[r]`, which are
    /// those of the row that rank r sends to this one.
    ///
    /// # Errors
    /// As [`Collective::gather`], and a failed tensor operation.
    fn exchange(
        &self,
        sent: Outgoing,
        expected: &[Vec<TensorForm>],
        patience: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError>;

    /// Ends all ranks and this process with an exit code.
    fn abort(&self, code: u8) -> !;

    /// Ends the job after all ranks have called this.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    fn finish(&self, patience: Patience) -> Result<(), RanksError>;
}

/// A job of one process.
#[derive(Clone, Copy, Debug)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> Rank {
        Rank::SOLO
    }

    fn gather(&self, message: Vec<u8>, _: Patience) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        Ok(Some(vec![message]))
    }

    fn broadcast(&self, message: Vec<u8>, _: Patience) -> Result<Vec<u8>, RanksError> {
        Ok(message)
    }

    fn exchange(
        &self,
        sent: Outgoing,
        _: &[Vec<TensorForm>],
        _: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        Ok(vec![sent.row(0).to_vec()])
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(i32::from(code))
    }

    fn finish(&self, _: Patience) -> Result<(), RanksError> {
        Ok(())
    }
}
