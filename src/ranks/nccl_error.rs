//! Errors of the exchange between GPUs.

use std::time::Duration;

/// Why GPUs can't exchange tensors by NCCL.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// A function failed.
    #[error("{function} failed: {message}; NCCL_DEBUG=WARN says more")]
    Call {
        /// Name of the function.
        function: &'static str,
        /// NCCL's message.
        message: String,
    },
    /// The ranks did not all start NCCL.
    #[error("ncclCommInitRank has not ended for {:.1} s: the GPUs of the ranks can't reach each other; NCCL_DEBUG=INFO says more", waited.as_secs_f64())]
    NotStarted {
        /// The time.
        waited: Duration,
    },
    /// The transfers did not end.
    #[error("NCCL: no answer from another rank for {:.1} s", waited.as_secs_f64())]
    NoAnswer {
        /// The time since the transfers were submitted.
        waited: Duration,
    },
    /// The id of rank 0 is no id.
    #[error("NCCL: rank 0 sent no id")]
    Id,
}
