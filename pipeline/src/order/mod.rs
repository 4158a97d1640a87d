//! The order of samples: a pure function of seed, epoch and lane.
//!
//! Owns counter-based randomness, the plan of an epoch, the schedule, the shuffle buffer and the cursor. The code
//! here never reads a clock, a thread number or the progress of another stage. The same settings therefore give the
//! same order on any machine, and the stream can resume at any position.

mod cursor;
mod lanes;
mod plan;
pub mod rng;
mod schedule;
mod shuffle;

pub use cursor::{Cursor, CursorMismatch};
pub use lanes::Lanes;
pub use plan::{EpochPlan, Order};

pub(crate) use cursor::{
    LaneCursor, OpenPass, OrderIdentity, OrderState, SampleRef, ShardProgress, fingerprint,
};
pub(crate) use schedule::{SchedulePosition, ShardPass, ShardSchedule};
pub(crate) use shuffle::{BufferMirror, Capacity, Drawn, ShuffleBuffer};
