//! `[mpi]`: the library that connects the ranks of a run. No flags.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::limits::Limits;

/// `[mpi]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MpiConfig {
    /// Name or path of the MPI library, opened when `train` is started by `mpirun` or `srun`; unset: the launcher's, by its usual name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
}

impl MpiConfig {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        let empty = self
            .library
            .as_ref()
            .is_some_and(|name| name.trim().is_empty());
        let needs = "must name a library, as \"libmpi.so.40\", or its path";
        limits.check("mpi.library", "\"\"", !empty, needs)
    }
}
