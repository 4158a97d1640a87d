//! `[report]`: measures of the distance between student and teacher. Off by default: they sample the teacher in 50 steps,
//! which is dear at full size. No flags.

use serde::{Deserialize, Serialize};

use super::bounds::{Bounds, MAX_GUIDANCE, MAX_STEPS, integer, real};
use super::limits::Limits;
use super::{ConfigError, Validation};

/// Bounds of the numbers in `[report]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("report.endpoint_captions", 0, 10_000),
    integer("report.endpoint_every", 1, MAX_STEPS),
    real("report.guidance", 0.0, MAX_GUIDANCE),
];

/// `[report]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Fixed captions the endpoint error is measured over; 0: it is not measured.
    pub endpoint_captions: usize,
    /// Steps between two measurements.
    pub endpoint_every: u64,
    /// Guidance of the samples compared, for the endpoint error and the grid.
    pub guidance: f64,
    /// Draw one grid at the end, for the prompts of `[validation]`: teacher in 50 and in 4 steps, student in 4 and
    /// in 1.
    pub grid: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            endpoint_captions: 0,
            endpoint_every: 50,
            guidance: 5.0,
            grid: false,
        }
    }
}

impl Report {
    pub(super) fn check(
        &self,
        validation: Option<&Validation>,
        limits: &Limits<'_>,
    ) -> Result<(), ConfigError> {
        let needs = "needs captions to draw: set validation.prompts or validation.prompts_file";
        let ok = !self.grid || validation.is_some();
        limits.check("report.grid", self.grid, ok, needs)
    }
}
