//! Messages between the ranks of a job over TCP, for launchers without MPI: `MASTER_ADDR` and `MASTER_PORT` name an address of rank 0,
//! as `torchrun` and Kubernetes jobs have them.
//!
//! Every rank is connected with every other. All ranks call the same operations in the same order, so the messages of a connection
//! need no names. The connections are neither encrypted nor protected: they are for a cluster's own network, as those of MPI and NCCL.

mod connect;
mod error;
mod link;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Tensor;

pub use error::TcpError;

use self::link::{Arrived, Link};
use super::tensors::exchange_as_bytes;
use super::wait::Silence;
use super::world::World;
use super::{Collective, ExchangeError, Outgoing, Patience, Rank, RanksError, TensorForm};
use crate::process::host_name;

/// Time in which another rank is told that this one ends the job.
const ABORT: Duration = Duration::from_secs(1);

/// The ranks of this job, connected by TCP.
#[derive(Debug)]
pub(super) struct TcpRanks {
    rank: Rank,
    world: World,
    /// The connections to the other ranks.
    links: RefCell<BTreeMap<usize, Link>>,
}

impl TcpRanks {
    /// Connects `rank` with all others. `master`: host and port of rank 0. `say` tells what is waited for.
    ///
    /// # Errors
    /// When a rank does not call or can't be reached within `limit`, or belongs to another job.
    pub(super) fn connect(
        rank: Rank,
        master: &(String, u16),
        limit: Duration,
        say: &dyn Fn(String),
    ) -> Result<Self, RanksError> {
        let mut links = BTreeMap::new();
        for (peer, stream) in connect::connect(rank, master, limit, say)? {
            let link = Link::new(peer, stream).map_err(|error| TcpError::Broken {
                operation: "start",
                rank: peer,
                nodes: Vec::new(),
                cause: error.to_string(),
            })?;
            links.insert(peer, link);
        }
        let mut ranks = Self {
            rank,
            world: World::new(rank.index, rank.world, "TCP".to_owned()),
            links: RefCell::new(links),
        };
        let patience = Patience::ForLife(limit);
        let names = ranks.gather(host_name().into_bytes(), patience)?;
        let names = ranks.broadcast(names.unwrap_or_default().join(&b'\n'), patience)?;
        let names = names.split(|byte| *byte == b'\n');
        ranks.world.nodes = names
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        Ok(ranks)
    }

    /// The ranks and their nodes.
    pub(super) fn world(&self) -> &World {
        &self.world
    }

    fn send(&self, peer: usize, message: &Arc<Vec<u8>>) {
        if let Some(link) = self.links.borrow().get(&peer) {
            link.send(Arc::clone(message));
        }
    }

    /// Receives a message from each of `peers`.
    fn receive(
        &self,
        operation: &'static str,
        peers: impl Iterator<Item = usize>,
        patience: Patience,
    ) -> Result<BTreeMap<usize, Vec<u8>>, TcpError> {
        let links = self.links.borrow();
        let links: BTreeMap<usize, &Link> = peers
            .filter_map(|peer| Some((peer, links.get(&peer)?)))
            .collect();
        let count = |link: &Link| match patience {
            Patience::ForData(_) => link.data(),
            Patience::ForLife(_) => link.signs(),
        };
        // The pieces that have come from each rank that is waited for, and how long none has come.
        let mut awaited: BTreeMap<usize, (u64, Silence)> = links
            .iter()
            .map(|(peer, link)| (*peer, (count(link), Silence::new())))
            .collect();
        let mut messages = BTreeMap::new();
        while !awaited.is_empty() {
            let mut silent = Vec::new();
            let mut waited = Duration::ZERO;
            let mut moved = false;
            for (peer, (pieces, silence)) in &mut awaited {
                let link = links[peer];
                let nodes = || self.nodes(&[*peer]);
                match link.take() {
                    Some(Arrived::Message(message)) => {
                        messages.insert(*peer, message);
                        moved = true;
                        continue;
                    }
                    Some(Arrived::Abort(code)) => {
                        let (rank, nodes) = (*peer, nodes());
                        return Err(TcpError::Ended { rank, nodes, code });
                    }
                    Some(Arrived::Closed(cause)) => {
                        return Err(TcpError::Broken {
                            operation,
                            rank: *peer,
                            nodes: nodes(),
                            cause,
                        });
                    }
                    None => {}
                }
                let now = count(link);
                if *pieces == now {
                    continue;
                }
                *pieces = now;
                silence.end();
            }
            awaited.retain(|peer, _| !messages.contains_key(peer));
            if moved {
                continue;
            }
            // One rank's pause is the pause of all.
            for (index, (peer, (_, silence))) in awaited.iter_mut().enumerate() {
                let quiet = if index == 0 {
                    silence.pause()
                } else {
                    silence.look()
                };
                if quiet >= patience.limit() {
                    silent.push(*peer);
                    waited = waited.max(quiet);
                }
            }
            if !silent.is_empty() {
                return Err(TcpError::NoAnswer {
                    operation,
                    nodes: self.nodes(&silent),
                    ranks: silent,
                    waited,
                });
            }
        }
        Ok(messages)
    }

    /// The nodes of `ranks`; empty before they are known.
    fn nodes(&self, ranks: &[usize]) -> Vec<String> {
        let node = |rank: &usize| self.world.nodes.get(*rank).cloned();
        ranks.iter().filter_map(node).collect()
    }
}

impl Collective for TcpRanks {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn gather(
        &self,
        message: Vec<u8>,
        patience: Patience,
    ) -> Result<Option<Vec<Vec<u8>>>, RanksError> {
        if !self.rank.leads() {
            self.send(0, &Arc::new(message));
            return Ok(None);
        }
        let received = self.receive("gather", 1..self.rank.world, patience)?;
        let all = std::iter::once(message).chain(received.into_values());
        Ok(Some(all.collect()))
    }

    fn broadcast(&self, message: Vec<u8>, patience: Patience) -> Result<Vec<u8>, RanksError> {
        if self.rank.leads() {
            let message = Arc::new(message);
            (1..self.rank.world).for_each(|peer| self.send(peer, &message));
            return Ok(Arc::unwrap_or_clone(message));
        }
        let mut received = self.receive("broadcast", 0..1, patience)?;
        Ok(received.remove(&0).unwrap_or_default())
    }

    fn exchange(
        &self,
        sent: Outgoing,
        expected: &[Vec<TensorForm>],
        patience: Patience,
    ) -> Result<Vec<Vec<Tensor>>, ExchangeError> {
        let Rank { index, world } = self.rank;
        exchange_as_bytes(index, sent, expected, |rows, lengths| {
            let mut rows: Vec<_> = rows.into_iter().map(Arc::new).collect();
            for peer in (1..world).map(|step| (index + step) % world) {
                let row = if rows.len() == 1 { 0 } else { peer };
                if !rows[row].is_empty() {
                    self.send(peer, &rows[row]);
                }
            }
            rows.clear();
            let peers = (0..world).filter(|peer| lengths[*peer] > 0);
            let mut received = self.receive("exchange", peers, patience)?;
            let row = |(rank, expected): (usize, usize)| {
                let message = received.remove(&rank).unwrap_or_default();
                let found = message.len();
                match found == expected {
                    true => Ok(message),
                    false => Err(TcpError::Length {
                        operation: "exchange",
                        rank,
                        expected,
                        found,
                    }),
                }
            };
            let rows = lengths.into_iter().enumerate().map(row);
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    fn abort(&self, code: u8) -> ! {
        let mut links = self.links.borrow_mut();
        for link in links.values_mut() {
            link.abort(code);
        }
        links.values_mut().for_each(|link| link.close(ABORT));
        process::exit(i32::from(code))
    }

    fn finish(&self, patience: Patience) -> Result<(), RanksError> {
        self.gather(Vec::new(), patience)?;
        self.broadcast(Vec::new(), patience)?;
        let mut links = self.links.borrow_mut();
        links
            .values_mut()
            .for_each(|link| link.close(patience.limit()));
        Ok(())
    }
}
