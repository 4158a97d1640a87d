//! The processes of one job: which one this is, and how all of them agree on a step.

mod lanes;
mod launcher;
mod tree;

use std::fmt;

use candle_core::Result;

pub use lanes::LanesError;
pub use launcher::{LauncherError, RankOrigin, from_environment};
pub use tree::TreeSum;

use crate::params::Grads;

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
}

/// Agreement of the processes of a job in each step. Results do not depend on the order in which processes answer.
pub trait Collective: fmt::Debug {
    /// This process.
    fn rank(&self) -> Rank;

    /// Replaces every gradient by its mean over all processes.
    ///
    /// # Errors
    /// When a tensor operation fails or a process does not answer.
    fn reduce(&self, gradients: &mut Grads) -> Result<()>;

    /// The mean of a number over all processes.
    ///
    /// # Errors
    /// When a process does not answer.
    fn mean(&self, number: f64) -> Result<f64>;
}

/// A job of one process.
#[derive(Clone, Copy, Debug)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> Rank {
        Rank::SOLO
    }

    fn reduce(&self, _gradients: &mut Grads) -> Result<()> {
        Ok(())
    }

    fn mean(&self, number: f64) -> Result<f64> {
        Ok(number)
    }
}
