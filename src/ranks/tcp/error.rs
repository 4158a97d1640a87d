//! Errors of the ranks that TCP connects.

use std::io;
use std::time::Duration;

use crate::ranks::error::named_ranks;

/// Why ranks can't be connected by TCP, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum TcpError {
    /// Rank 0 can't listen.
    #[error("rank 0 can't listen at {address} (MASTER_ADDR, MASTER_PORT): {source}")]
    Listen {
        /// Host and port.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// A rank can't be reached.
    #[error("rank {rank} can't be reached at {address} for {:.1} s: {source}", waited.as_secs_f64())]
    Connect {
        /// The rank that was called.
        rank: usize,
        /// Host and port.
        address: String,
        /// Time of the attempts.
        waited: Duration,
        /// The cause of the last one.
        source: io::Error,
    },
    /// Ranks have not called.
    #[error("no connection from {} for {:.1} s: start all ranks with the same MASTER_ADDR, MASTER_PORT and number of ranks", named_ranks(ranks, &[]), waited.as_secs_f64())]
    Absent {
        /// The ranks, in ascending order.
        ranks: Vec<usize>,
        /// Time since this rank began to listen.
        waited: Duration,
    },
    /// A rank is not one of this job.
    #[error("{0}")]
    Stranger(String),
    /// Ranks did not answer.
    #[error("{operation}: no answer from {} for {:.1} s", named_ranks(ranks, nodes), waited.as_secs_f64())]
    NoAnswer {
        /// The operation, as in "gather".
        operation: &'static str,
        /// The ranks without an answer, in ascending order.
        ranks: Vec<usize>,
        /// Names of these ranks' nodes, in the same order; empty if they are not known.
        nodes: Vec<String>,
        /// Time since the last data.
        waited: Duration,
    },
    /// A rank has ended the job.
    #[error("{} has ended the job with exit code {code}", named_ranks(&[*rank], nodes))]
    Ended {
        /// The rank.
        rank: usize,
        /// Name of its node; empty if it is not known.
        nodes: Vec<String>,
        /// Its exit code.
        code: u8,
    },
    /// The connection to a rank is broken.
    #[error("{operation}: the connection to {} is broken: {cause}", named_ranks(&[*rank], nodes))]
    Broken {
        /// The operation.
        operation: &'static str,
        /// The rank.
        rank: usize,
        /// Name of its node; empty if it is not known.
        nodes: Vec<String>,
        /// The cause.
        cause: String,
    },
    /// A rank sent a message of another length than agreed.
    #[error(
        "{operation}: rank {rank} sent {found} bytes instead of {expected}: do all ranks run the same program and configuration?"
    )]
    Length {
        /// The operation.
        operation: &'static str,
        /// The rank that sent the message.
        rank: usize,
        /// Bytes that were expected.
        expected: usize,
        /// Bytes that came.
        found: usize,
    },
}

impl TcpError {
    /// Whether the launcher's environment is at fault, or what another rank says is.
    pub(in crate::ranks) fn is_config(&self) -> bool {
        match self {
            Self::Listen { .. } | Self::Stranger(_) => true,
            Self::Ended { code, .. } => *code == 2,
            _ => false,
        }
    }
}
