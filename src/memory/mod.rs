//! The memory of a run: an estimate from the configuration and the files of its models, and the refusal of a run that the machine
//! can't hold, before the memory is asked for.

mod activations;
mod limits;
mod plan;
mod sampling;
mod sizes;

pub use limits::{MemoryError, MemoryLimits, check};
pub use plan::{MemoryPlan, Verdict, trained_parameters};
pub use sampling::check_sampling;
pub use sizes::{Command, EncoderSizes, Sizes, TeacherSizes};

/// A size for people, as `1.50 GB`.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes >= 1e9 => format!("{:.2} GB", bytes / 1e9),
        _ if bytes >= 1e6 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}
