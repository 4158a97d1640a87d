//! Messages between the ranks of a job over MPI, whose library is opened at run time.
//!
//! Only point-to-point messages of bytes are used: no algorithm of an MPI library decides the order of a sum, and an
//! operation that does not end can name the ranks that have not answered. Nothing blocks inside MPI: every wait polls,
//! sleeps at most 0.5 ms between polls, and has a limit.
//!
//! All ranks must call the same operations in the same order. After an error the job can only be aborted
//! ([`Mpi::abort`]): messages of the failed operation may still arrive.

mod collective;
mod error;
mod library;
mod manager;
mod transfer;
mod wait;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::c_int;
use std::mem;
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub use error::MpiError;
pub(super) use manager::{ExpectedRank, ProcessManager};

use library::{Envelope, MpiLibrary};
use transfer::Transfers;

/// The most bytes that a message of [`Mpi::gather`] or [`Mpi::broadcast`] may have.
const LONGEST_MESSAGE: u64 = 1 << 32;
/// Bytes of a message's length, which is sent before the message.
const LENGTH_BYTES: usize = size_of::<u64>();
/// Time that `MPI_Abort` has to end this process.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// An operation: its name in errors and the tag of its messages.
#[derive(Clone, Copy, Debug)]
struct Operation {
    name: &'static str,
    tag: c_int,
}

const GATHER: Operation = Operation {
    name: "gather",
    tag: 11,
};
const BROADCAST: Operation = Operation {
    name: "broadcast",
    tag: 12,
};
const ALL_TO_ALL: Operation = Operation {
    name: "all-to-all",
    tag: 13,
};
const ALL_GATHER: Operation = Operation {
    name: "all-gather",
    tag: 14,
};

impl Operation {
    fn with(self, peer: usize) -> Envelope {
        Envelope {
            peer,
            tag: self.tag,
        }
    }
}

/// How to open MPI.
#[derive(Clone, Copy, Debug)]
pub struct MpiOptions<'a> {
    /// Name or path of the library; `None` takes the first that the system's loader finds.
    pub library: Option<&'a str>,
    /// The process manager that started this process: it decides which libraries are looked for.
    pub manager: ProcessManager,
    /// The rank that the launcher's variables say; a library that says otherwise is refused.
    pub expected: Option<ExpectedRank<'a>>,
    /// Time without an answer of the other ranks after which [`Mpi::open`] fails. It does not cover `MPI_Init`, which
    /// may wait for ranks that never start.
    pub limit: Duration,
}

/// The ranks of this job, connected by MPI. Only the thread that opened it can use it.
///
/// Dropping it does not end MPI: that is [`Mpi::finish`], after an agreed end. A process that exits without it makes
/// the launcher end the other ranks.
#[derive(Debug)]
pub struct Mpi {
    library: MpiLibrary,
    version: String,
    rank: usize,
    world: usize,
    /// Name of each rank's node.
    nodes: Vec<String>,
    /// Whether an operation has failed.
    broken: Cell<bool>,
}

impl Mpi {
    /// Loads the MPI library, starts MPI (thread level `FUNNELED`) and exchanges the nodes' names with all ranks.
    ///
    /// Call it before other threads start: MPI libraries change the environment while they start.
    ///
    /// # Errors
    /// When no library is found or usable, MPI was started before in this process, the library does not see the ranks
    /// that the launcher started, or a rank does not answer within the limit. A library may end the process instead:
    /// Open MPI 4 does where its launcher's daemon does not answer.
    pub fn open(options: &MpiOptions<'_>) -> Result<Self, MpiError> {
        static OPENED: AtomicBool = AtomicBool::new(false);
        if OPENED.swap(true, Ordering::SeqCst) {
            return Err(MpiError::AlreadyOpen);
        }
        let library = match options.library {
            Some(name) => MpiLibrary::open(&[name], "check mpi.library"),
            None => MpiLibrary::open(&options.manager.libraries(), options.manager.remedy()),
        }?;
        if let Some(reason) = manager::refusal(library.abi, options.manager) {
            return Err(MpiError::Mismatch(reason));
        }
        library.init()?;
        let version = library.version()?;
        let (rank, world) = library.rank_and_world()?;
        let mismatch = options.expected.and_then(|expected| {
            let name = format!("{version} ({})", library.file.display());
            manager::mismatch(expected, (rank, world), &name, options.manager)
        });
        if let Some(reason) = mismatch {
            return Err(MpiError::Mismatch(reason));
        }
        let mut mpi = Self {
            library,
            version,
            rank,
            world,
            nodes: Vec::new(),
            broken: Cell::new(false),
        };
        mpi.nodes = mpi.exchange_nodes(options.limit)?;
        Ok(mpi)
    }

    /// This process's rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks, at least 1.
    pub fn world(&self) -> usize {
        self.world
    }

    /// This rank's number among the ranks of its node, from 0.
    pub fn local_rank(&self) -> usize {
        self.neighbours(0..self.rank)
    }

    /// Number of ranks on this rank's node, at least 1.
    pub fn local_world(&self) -> usize {
        self.neighbours(0..self.world)
    }

    /// Number of nodes, at least 1.
    pub fn nodes(&self) -> usize {
        self.nodes.iter().collect::<BTreeSet<_>>().len()
    }

    /// Name of the node of `rank`, as MPI says; `None` for no rank.
    pub fn node(&self, rank: usize) -> Option<&str> {
        self.nodes.get(rank).map(String::as_str)
    }

    /// Name and version of the library, as in "Open MPI 4.1.4".
    pub fn library(&self) -> &str {
        &self.version
    }

    /// Path of the library's file.
    pub fn file(&self) -> &std::path::Path {
        &self.library.file
    }

    /// Sends every rank's message, of any length, to rank 0. Returns all of them at rank 0, in rank order; `None`
    /// elsewhere, where it returns before rank 0 has the message.
    ///
    /// # Errors
    /// When ranks do not answer for `limit`, or MPI fails.
    pub fn gather(
        &self,
        message: &[u8],
        limit: Duration,
    ) -> Result<Option<Vec<Vec<u8>>>, MpiError> {
        self.run(|| {
            if self.rank > 0 {
                self.send_message(0..1, message.to_vec(), GATHER, limit)?;
                return Ok(None);
            }
            let mut messages = vec![message.to_vec()];
            messages.extend(self.receive_messages(1..self.world, GATHER, limit)?);
            Ok(Some(messages))
        })
    }

    /// Sends rank 0's message, of any length, to all ranks, and returns it at every rank. The argument of the other
    /// ranks is ignored.
    ///
    /// # Errors
    /// When ranks do not answer for `limit`, or MPI fails. Rank 0 may be late because it waits for a third rank in a
    /// [`Mpi::gather`] before: with a longer limit at the other ranks, rank 0's error comes first and names that rank.
    pub fn broadcast(&self, message: Vec<u8>, limit: Duration) -> Result<Vec<u8>, MpiError> {
        self.run(|| {
            if self.rank == 0 {
                return self.send_message(1..self.world, message, BROADCAST, limit);
            }
            let received = self.receive_messages(0..1, BROADCAST, limit)?;
            Ok(received.into_iter().next().unwrap_or_default())
        })
    }

    /// Sends row r of `rows` to rank r, for all r. `rows` has [`Mpi::world`] rows of equal length, one after another, and
    /// so has `received`: its row r comes from rank r.
    ///
    /// # Errors
    /// When the lengths do not fit, ranks do not answer for `limit`, or MPI fails. After the last two both buffers are
    /// empty: their memory is lost, because MPI may still use it.
    pub fn all_to_all(
        &self,
        rows: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), MpiError> {
        let fits = rows.len() == received.len() && rows.len().is_multiple_of(self.world);
        self.check_buffers(ALL_TO_ALL, fits, rows, received)?;
        let length = rows.len() / self.world;
        let row = |rank: usize| rank * length..(rank + 1) * length;
        received[row(self.rank)].copy_from_slice(&rows[row(self.rank)]);
        self.exchange(ALL_TO_ALL, rows, row, received, row, limit)
    }

    /// Sends `segment` to all ranks. `received` has the room of [`Mpi::world`] segments: segment r comes from rank r. The
    /// segments of all ranks have the same length.
    ///
    /// # Errors
    /// As [`Mpi::all_to_all`].
    pub fn all_gather(
        &self,
        segment: &mut Vec<f32>,
        received: &mut Vec<f32>,
        limit: Duration,
    ) -> Result<(), MpiError> {
        let length = segment.len();
        let fits = length.checked_mul(self.world) == Some(received.len());
        self.check_buffers(ALL_GATHER, fits, segment, received)?;
        let place = |rank: usize| rank * length..(rank + 1) * length;
        received[place(self.rank)].copy_from_slice(segment);
        self.exchange(ALL_GATHER, segment, |_| 0..length, received, place, limit)
    }

    /// Ends all ranks and this process, with coffey's exit code `code`.
    pub fn abort(&self, code: i32) -> ! {
        // MPICH's `MPI_Abort` waits for an answer of its launcher without a limit; none comes over a broken network.
        let ender = thread::Builder::new().name("abort".to_owned());
        drop(ender.spawn(move || end_late(code)));
        self.library.abort(code);
        process::exit(code)
    }

    /// Ends MPI after all ranks have called this function.
    ///
    /// # Errors
    /// When ranks do not call it for `limit`, an operation failed before, or MPI fails.
    pub fn finish(&self, limit: Duration) -> Result<(), MpiError> {
        // MPI_Finalize waits without a limit, so all ranks must have arrived before it.
        self.gather(&[], limit)?;
        self.broadcast(Vec::new(), limit)?;
        self.broken.set(true);
        self.library.finalize()
    }

    /// Number of `ranks` on this rank's node.
    fn neighbours(&self, ranks: Range<usize>) -> usize {
        let own = self.node(self.rank);
        ranks.filter(|rank| self.node(*rank) == own).count()
    }

    /// The node of every rank.
    fn exchange_nodes(&self, limit: Duration) -> Result<Vec<String>, MpiError> {
        let names = self.gather(self.library.processor_name()?.as_bytes(), limit)?;
        let joined = names.map(|names| names.join(&0)).unwrap_or_default();
        // Rank 0 names the ranks that do not answer; the others wait longer, for its error to come first.
        let limit = if self.rank == 0 { limit } else { limit * 2 };
        let names = self.broadcast(joined, limit)?;
        let names = names.split(|byte| *byte == 0);
        Ok(names
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    /// Runs an operation, unless an earlier one failed.
    fn run<T>(&self, operation: impl FnOnce() -> Result<T, MpiError>) -> Result<T, MpiError> {
        if self.broken.replace(true) {
            return Err(MpiError::Broken);
        }
        let result = operation().map_err(|error| error.with_nodes(&self.nodes))?;
        self.broken.set(false);
        Ok(result)
    }

    fn check_buffers(
        &self,
        operation: Operation,
        fits: bool,
        sent: &[f32],
        received: &[f32],
    ) -> Result<(), MpiError> {
        if fits {
            return Ok(());
        }
        Err(MpiError::Buffers {
            operation: operation.name,
            sent: sent.len(),
            received: received.len(),
            world: self.world,
        })
    }

    /// Sends the elements `source(r)` of `sent` to rank r and receives `target(r)` from it, for all other ranks r.
    fn exchange(
        &self,
        operation: Operation,
        sent: &mut Vec<f32>,
        source: impl Fn(usize) -> Range<usize>,
        received: &mut Vec<f32>,
        target: impl Fn(usize) -> Range<usize>,
        limit: Duration,
    ) -> Result<(), MpiError> {
        self.run(|| {
            let mut transfers = Transfers::new(&self.library, operation.name);
            let incoming = transfers.incoming(mem::take(received));
            let outgoing = transfers.outgoing(mem::take(sent));
            for peer in (0..self.world).filter(|peer| *peer != self.rank) {
                transfers.receive(operation.with(peer), incoming, target(peer))?;
            }
            // Each rank begins with another peer, so that no rank receives from all at once.
            for peer in (1..self.world).map(|step| (self.rank + step) % self.world) {
                transfers.send(operation.with(peer), outgoing, source(peer))?;
            }
            let ended = transfers.wait(limit)?;
            *received = ended.incoming.into_iter().next().unwrap_or_default();
            *sent = ended.outgoing.into_iter().next().unwrap_or_default();
            Ok(())
        })
    }

    /// Sends a message, after its length, to `peers`. Returns the message.
    fn send_message(
        &self,
        peers: Range<usize>,
        message: Vec<u8>,
        operation: Operation,
        limit: Duration,
    ) -> Result<Vec<u8>, MpiError> {
        let bytes = message.len();
        check_length(bytes as u64, self.rank, operation)?;
        let mut transfers = Transfers::new(&self.library, operation.name);
        let length = transfers.outgoing((bytes as u64).to_le_bytes().to_vec());
        let body = transfers.outgoing(message);
        for peer in peers {
            transfers.send(operation.with(peer), length, 0..LENGTH_BYTES)?;
            transfers.send(operation.with(peer), body, 0..bytes)?;
        }
        let ended = transfers.wait(limit)?;
        Ok(ended.outgoing.into_iter().nth(1).unwrap_or_default())
    }

    /// Receives a message from each of `peers`.
    fn receive_messages(
        &self,
        peers: Range<usize>,
        operation: Operation,
        limit: Duration,
    ) -> Result<Vec<Vec<u8>>, MpiError> {
        let mut transfers = Transfers::new(&self.library, operation.name);
        for peer in peers.clone() {
            let length = transfers.incoming(vec![0; LENGTH_BYTES]);
            transfers.receive(operation.with(peer), length, 0..LENGTH_BYTES)?;
        }
        let lengths = transfers.wait(limit)?.incoming;
        let mut transfers = Transfers::new(&self.library, operation.name);
        for (peer, length) in peers.zip(lengths) {
            let length = length.try_into().map_or(u64::MAX, u64::from_le_bytes);
            let bytes = check_length(length, peer, operation)?;
            let body =
                transfers.incoming(room(bytes).ok_or_else(|| too_long(length, peer, operation))?);
            transfers.receive(operation.with(peer), body, 0..bytes)?;
        }
        Ok(transfers.wait(limit)?.incoming)
    }
}

/// Ends this process with `code` after [`ABORT_LIMIT`].
fn end_late(code: c_int) {
    thread::sleep(ABORT_LIMIT);
    library::end_process(code);
}

/// `bytes` zeros; `None` if there is no memory for them.
fn room(bytes: usize) -> Option<Vec<u8>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).ok()?;
    buffer.resize(bytes, 0);
    Some(buffer)
}

/// The length of a message as a number of bytes in memory.
///
/// # Errors
/// When it is longer than [`LONGEST_MESSAGE`].
fn check_length(bytes: u64, rank: usize, operation: Operation) -> Result<usize, MpiError> {
    let length = usize::try_from(bytes).ok();
    let length = length.filter(|_| bytes <= LONGEST_MESSAGE);
    length.ok_or_else(|| too_long(bytes, rank, operation))
}

fn too_long(bytes: u64, rank: usize, operation: Operation) -> MpiError {
    MpiError::TooLong {
        operation: operation.name,
        rank,
        bytes,
        most: LONGEST_MESSAGE,
    }
}
