//! Errors of the MPI transport.

use std::time::Duration;

use crate::ranks::error::named_ranks;

/// A failure to open MPI or to exchange data with the other ranks.
#[derive(Debug, thiserror::Error)]
pub enum MpiError {
    /// No MPI library can be loaded.
    #[error("no MPI library can be loaded ({tried}); {remedy}")]
    NoLibrary {
        /// The loader's message for each name.
        tried: String,
        /// The remedy: a package or a key of the configuration.
        remedy: String,
    },
    /// A library was loaded and can't be used.
    #[error("{file} can't be used as an MPI library: {reason}")]
    Unusable {
        /// Path of the library.
        file: String,
        /// The missing part of the library.
        reason: String,
    },
    /// MPI does not start: it waits for all ranks of the job.
    #[error(
        "MPI_Init has not ended for {:.1} s: not every process that the launcher started has begun to run coffey with this MPI, or the \
         ranks can't reach each other", waited.as_secs_f64()
    )]
    NotStarted {
        /// The time.
        waited: Duration,
    },
    /// A second start of MPI, which it does not allow.
    #[error("MPI has already been started in this process")]
    AlreadyOpen,
    /// The launcher started ranks that the loaded library does not see; the text names both and the remedy.
    #[error("{0}")]
    Mismatch(String),
    /// An MPI function returned an error.
    #[error("{function} failed{during}: {message}")]
    Call {
        /// Name of the function.
        function: &'static str,
        /// Operation and peer, as in " in exchange with rank 3"; may be empty.
        during: String,
        /// The library's message.
        message: String,
    },
    /// Ranks did not answer.
    #[error("{operation}: no answer from {} for {:.1} s", named_ranks(ranks, nodes), waited.as_secs_f64())]
    NoAnswer {
        /// The operation, as in "gather".
        operation: &'static str,
        /// The ranks without an answer, in ascending order.
        ranks: Vec<usize>,
        /// Names of these ranks' nodes, in the same order; empty if they are not known.
        nodes: Vec<String>,
        /// Time since the last data from any rank.
        waited: Duration,
    },
    /// A rank sent a message of another length than agreed: the ranks run different operations or programs.
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
    /// A message is too long, or there is no memory for it.
    #[error(
        "{operation}: no room for a message of {bytes} bytes from rank {rank} (at most {most})"
    )]
    TooLong {
        /// The operation.
        operation: &'static str,
        /// The rank that sends the message.
        rank: usize,
        /// Bytes of the message.
        bytes: u64,
        /// Bytes that a message may have.
        most: u64,
    },
    /// The thread that owns MPI can't be started.
    #[error("no thread for MPI: {0}")]
    Thread(std::io::Error),
    /// An operation failed before: late messages of it could be taken for those of the next one.
    #[error("an earlier MPI operation failed: the job can only be aborted")]
    Broken,
}

impl MpiError {
    /// Whether the machine's installation, the launcher or the configuration is at fault.
    pub(in crate::ranks) fn is_config(&self) -> bool {
        matches!(
            self,
            Self::NoLibrary { .. } | Self::Unusable { .. } | Self::Mismatch(_)
        )
    }

    /// The error with the nodes of the ranks that it names; `all` holds the node of every rank.
    pub(super) fn with_nodes(mut self, all: &[String]) -> Self {
        if let Self::NoAnswer { ranks, nodes, .. } = &mut self {
            *nodes = ranks
                .iter()
                .filter_map(|rank| all.get(*rank).cloned())
                .collect();
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_without_an_answer_are_named_with_their_nodes() {
        let all: Vec<String> = (0..20).map(|rank| format!("node{}", rank / 2)).collect();
        let error = |ranks: Vec<usize>| MpiError::NoAnswer {
            operation: "exchange",
            ranks,
            nodes: Vec::new(),
            waited: Duration::from_millis(2500),
        };
        assert_eq!(
            error(vec![3]).to_string(),
            "exchange: no answer from rank 3 for 2.5 s"
        );
        assert_eq!(
            error(vec![1, 3, 4]).with_nodes(&all).to_string(),
            "exchange: no answer from ranks 1 (node0), 3 (node1) and 4 (node2) for 2.5 s"
        );
        assert_eq!(
            error((1..20).collect()).to_string(),
            "exchange: no answer from ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more for 2.5 s"
        );
    }
}
