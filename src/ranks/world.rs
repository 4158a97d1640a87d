//! The ranks of a job and the nodes that they run on.

use std::collections::BTreeSet;
use std::ops::Range;

/// The ranks of a job and the nodes that they run on.
#[derive(Clone, Debug)]
pub(super) struct World {
    rank: usize,
    size: usize,
    /// Name of each rank's node.
    pub(super) nodes: Vec<String>,
    /// What connects the ranks, as in "Open MPI 4.1.4".
    pub(super) transport: String,
}

impl World {
    /// Rank `rank` of `size`, whose nodes are not known yet.
    pub(super) fn new(rank: usize, size: usize, transport: String) -> Self {
        Self {
            rank,
            size,
            nodes: Vec::new(),
            transport,
        }
    }

    /// Number of this process, from 0.
    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks, at least 1.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Name of this rank's node.
    pub(super) fn node(&self) -> Option<&str> {
        self.nodes.get(self.rank).map(String::as_str)
    }

    /// Number of nodes, at least 1.
    pub(super) fn node_count(&self) -> usize {
        self.nodes.iter().collect::<BTreeSet<_>>().len()
    }

    /// This rank's number among the ranks of its node, from 0.
    pub(super) fn local_rank(&self) -> usize {
        self.neighbours(0..self.rank)
    }

    /// Number of ranks on this rank's node, at least 1.
    pub(super) fn local_size(&self) -> usize {
        self.neighbours(0..self.size)
    }

    /// Number of `ranks` on this rank's node.
    fn neighbours(&self, ranks: Range<usize>) -> usize {
        let own = self.node();
        ranks
            .filter(|rank| self.nodes.get(*rank).map(String::as_str) == own)
            .count()
    }
}
