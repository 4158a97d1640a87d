//! The order of samples: a pure function of seed, epoch, rank and world.
//!
//! Owns counter-based randomness, the shard permutation and schedule, the shuffle buffer and the cursor. Nothing
//! here reads a clock, a thread number or how far some other part has come, so the same settings
//! give the same order on any machine, and any place in it can be found again.

mod cursor;
mod permutation;
pub mod rng;
mod schedule;
mod shuffle;

pub use cursor::{Cursor, CursorMismatch};
pub use permutation::{EpochPlan, Order};

pub(crate) use cursor::{OpenVisit, OrderIdentity, Place, SampleRef, Tally, fingerprint};
pub(crate) use schedule::{Schedule, Turn, Visit};
pub(crate) use shuffle::{Capacity, Drawn, ShuffleBuffer};
