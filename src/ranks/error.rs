//! Why the ranks of a job can't work together.

use super::{LauncherError, MpiError, NcclError, TcpError};

/// Ranks that an error names before it counts the rest.
const NAMED_RANKS: usize = 8;

/// Why the ranks of a job can't work together.
#[derive(Debug, thiserror::Error)]
pub enum RanksError {
    /// MPI can't be opened, or a message did not come.
    #[error("MPI: {0}")]
    Mpi(#[from] MpiError),
    /// The ranks can't be connected by TCP, or a message did not come.
    #[error(transparent)]
    Tcp(#[from] TcpError),
    /// The GPUs of the ranks can't exchange tensors.
    #[error(transparent)]
    Nccl(#[from] NcclError),
    /// The launcher's environment names no valid rank.
    #[error(transparent)]
    Launcher(#[from] LauncherError),
    /// The launcher started several processes, and nothing connects them.
    #[error(
        "{origin} say that this is rank {rank} of {world}, and nothing connects the ranks: each would make a run of its own; start them \
         with mpirun, or with srun --mpi=pmix or --mpi=pmi2, or set MASTER_ADDR and MASTER_PORT to an address of rank 0 that all reach"
    )]
    NoTransport {
        /// The variables.
        origin: String,
        /// The rank, from 0.
        rank: usize,
        /// Number of ranks.
        world: usize,
    },
    /// The ranks do not make the same run.
    #[error("{0}")]
    Differ(String),
    /// The weights of the ranks are no longer the same.
    #[error("{0}: bad memory, or processors that round differently")]
    Drifted(String),
    /// A message from another rank can't be read.
    #[error("a message of rank {rank} can't be read: {cause}")]
    Message {
        /// Sender of the message.
        rank: usize,
        /// The fault.
        cause: String,
    },
}

impl RanksError {
    /// Whether the command line, the configuration or the launcher's environment is at fault.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Launcher(_) | Self::NoTransport { .. } | Self::Differ(_) => true,
            Self::Mpi(error) => error.is_config(),
            Self::Tcp(error) => error.is_config(),
            Self::Nccl(_) | Self::Drifted(_) | Self::Message { .. } => false,
        }
    }
}

/// "rank 3 (node7)", "ranks 1 (node1) and 3 (node7)"; without nodes where `nodes` has another length than `ranks`.
pub(super) fn named_ranks(ranks: &[usize], nodes: &[String]) -> String {
    let name = |index: usize| match nodes.get(index) {
        Some(node) if nodes.len() == ranks.len() => format!("{} ({node})", ranks[index]),
        _ => ranks[index].to_string(),
    };
    let named: Vec<_> = (0..ranks.len().min(NAMED_RANKS)).map(name).collect();
    let rest = ranks.len() - named.len();
    match named.as_slice() {
        [] => "no rank".to_owned(),
        [only] => format!("rank {only}"),
        all if rest > 0 => format!("ranks {} and {rest} more", all.join(", ")),
        [first @ .., last] => format!("ranks {} and {last}", first.join(", ")),
    }
}
