//! Messages between the ranks of a job over MPI, whose library is opened at run time.
//!
//! Only point-to-point messages of bytes are used: no algorithm of an MPI library decides the order of a sum, and an
//! operation that does not end can name the ranks that have not answered. Nothing blocks inside MPI: every wait polls,
//! sleeps at most 0.5 ms between polls, and has a limit.
//!
//! One thread owns MPI ([`MpiRanks`]) and sends heartbeats, whatever work the others do.
//!
//! All ranks must call the same operations in the same order. After an error the job can only be aborted
//! ([`Mpi::abort`]): messages of the failed operation may still arrive.

mod collective;
mod error;
mod heartbeat;
mod library;
mod manager;
mod transfer;

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::ops::Range;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

pub(super) use collective::MpiRanks;
pub use error::MpiError;
pub(super) use manager::{ExpectedRank, ProcessManager};

use heartbeat::Heartbeats;
use library::{Envelope, MpiLibrary};
use transfer::Transfers;

use super::Patience;
use super::world::World;

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
const EXCHANGE: Operation = Operation {
    name: "exchange",
    tag: 13,
};
const HEARTBEAT: Operation = Operation {
    name: "heartbeat",
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
#[derive(Clone, Debug)]
pub(super) struct MpiOptions {
    /// Name or path of the library; `None` takes the first that the system's loader finds.
    pub(super) library: Option<String>,
    /// The process manager that started this process: it decides which libraries are looked for.
    pub(super) manager: ProcessManager,
    /// The rank that the launcher's variables say; a library that says otherwise is refused.
    pub(super) expected: Option<ExpectedRank>,
    /// Time without an answer of the other ranks after which the start fails.
    pub(super) limit: Duration,
}

/// A started library, and the heartbeats that go over it.
#[derive(Debug)]
struct Connection {
    library: MpiLibrary,
    heartbeats: RefCell<Heartbeats>,
}

/// The ranks of this job, connected by MPI. Only the thread that opened it can use it.
///
/// Dropping it does not end MPI: that is [`Mpi::finish`], after an agreed end. A process that exits without it makes
/// the launcher end the other ranks.
#[derive(Debug)]
struct Mpi {
    connection: Connection,
    world: World,
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
    fn open(options: &MpiOptions) -> Result<Self, MpiError> {
        static OPENED: AtomicBool = AtomicBool::new(false);
        if OPENED.swap(true, Ordering::SeqCst) {
            return Err(MpiError::AlreadyOpen);
        }
        let library = match &options.library {
            Some(name) => MpiLibrary::open(&[name], "check mpi.library"),
            None => MpiLibrary::open(&options.manager.libraries(), options.manager.remedy()),
        }?;
        if let Some(reason) = manager::refusal(library.abi, options.manager) {
            return Err(MpiError::Mismatch(reason));
        }
        library.init()?;
        let version = library.version()?;
        let (rank, world) = library.rank_and_world()?;
        let mismatch = options.expected.as_ref().and_then(|expected| {
            let name = format!("{version} ({})", library.file.display());
            manager::mismatch(expected, (rank, world), &name, options.manager)
        });
        if let Some(reason) = mismatch {
            return Err(MpiError::Mismatch(reason));
        }
        let heartbeats = RefCell::new(Heartbeats::new(&library, rank, world)?);
        let mut mpi = Self {
            connection: Connection {
                library,
                heartbeats,
            },
            world: World::new(rank, world, version),
            broken: Cell::new(false),
        };
        mpi.world.nodes = mpi.exchange_nodes(options.limit)?;
        Ok(mpi)
    }

    /// Sends the heartbeats that are due and looks at those of other ranks. A failure is that of the next operation.
    fn beat(&self) {
        let mut heartbeats = self.connection.heartbeats.borrow_mut();
        if heartbeats.beat(&self.connection.library).is_err() {
            self.broken.set(true);
        }
    }

    /// Sends every rank's message, of any length, to rank 0. Returns all of them at rank 0, in rank order; `None`
    /// elsewhere, where it may return before rank 0 has the message.
    ///
    /// # Errors
    /// When the patience ends, or MPI fails.
    fn gather(
        &self,
        message: Vec<u8>,
        patience: Patience,
    ) -> Result<Option<Vec<Vec<u8>>>, MpiError> {
        self.run(|| {
            if self.world.rank() > 0 {
                self.send_message(0..1, message, GATHER, patience)?;
                return Ok(None);
            }
            let mut messages = vec![message];
            messages.extend(self.receive_messages(1..self.world.size(), GATHER, patience)?);
            Ok(Some(messages))
        })
    }

    /// Sends rank 0's message, of any length, to all ranks, and returns it at every rank. The argument of the other
    /// ranks is ignored.
    ///
    /// # Errors
    /// When the patience ends, or MPI fails.
    fn broadcast(&self, message: Vec<u8>, patience: Patience) -> Result<Vec<u8>, MpiError> {
        self.run(|| {
            if self.world.rank() == 0 {
                return self.send_message(1..self.world.size(), message, BROADCAST, patience);
            }
            let received = self.receive_messages(0..1, BROADCAST, patience)?;
            Ok(received.into_iter().next().unwrap_or_default())
        })
    }

    /// Sends a row of bytes to each rank, or one row to all, and receives `lengths[r]` bytes from rank r. The row of this rank itself is
    /// empty.
    ///
    /// # Errors
    /// When a rank sends another length, the patience ends, or MPI fails.
    fn exchange(
        &self,
        sent: Vec<Vec<u8>>,
        lengths: &[usize],
        patience: Patience,
    ) -> Result<Vec<Vec<u8>>, MpiError> {
        self.run(|| {
            let (rank, size) = (self.world.rank(), self.world.size());
            let mut transfers = Transfers::new(&self.connection, EXCHANGE.name);
            for (peer, &bytes) in lengths.iter().enumerate() {
                let incoming = transfers.incoming(vec![0; bytes]);
                transfers.receive(EXCHANGE.with(peer), incoming, 0..bytes)?;
            }
            let lengths: Vec<usize> = sent.iter().map(Vec::len).collect();
            let rows: Vec<_> = sent
                .into_iter()
                .map(|row| transfers.outgoing(row))
                .collect();
            // Each rank begins with another peer, so that no rank receives from all at once.
            for peer in (1..size).map(|step| (rank + step) % size) {
                let row = if rows.len() == 1 { 0 } else { peer };
                transfers.send(EXCHANGE.with(peer), rows[row], 0..lengths[row])?;
            }
            Ok(transfers.wait(patience)?.incoming)
        })
    }

    /// Ends all ranks and this process, with coffey's exit code `code`.
    fn abort(&self, code: i32) -> ! {
        // MPICH's `MPI_Abort` waits for an answer of its launcher without a limit; none comes over a broken network.
        let ender = thread::Builder::new().name("abort".to_owned());
        drop(ender.spawn(move || end_late(code)));
        self.connection.library.abort(code);
        process::exit(code)
    }

    /// Ends MPI after all ranks have called this function.
    ///
    /// # Errors
    /// When the patience ends, an operation failed before, or MPI fails.
    fn finish(&self, patience: Patience) -> Result<(), MpiError> {
        // MPI_Finalize waits without a limit, so all ranks must have arrived before it.
        self.gather(Vec::new(), patience)?;
        self.broadcast(Vec::new(), patience)?;
        self.run(|| {
            let Connection {
                library,
                heartbeats,
            } = &self.connection;
            let missing = heartbeats.borrow_mut().close(library, patience.limit())?;
            if missing.is_empty() {
                return library.finalize();
            }
            Err(MpiError::NoAnswer {
                operation: HEARTBEAT.name,
                ranks: missing,
                nodes: Vec::new(),
                waited: patience.limit(),
            })
        })?;
        self.broken.set(true);
        Ok(())
    }

    /// The node of every rank.
    fn exchange_nodes(&self, limit: Duration) -> Result<Vec<String>, MpiError> {
        let patience = Patience::ForLife(limit);
        let name = self.connection.library.processor_name()?;
        let names = self.gather(name.into_bytes(), patience)?;
        let joined = names.map(|names| names.join(&0)).unwrap_or_default();
        let names = self.broadcast(joined, patience)?;
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
        let result = operation().map_err(|error| error.with_nodes(&self.world.nodes))?;
        self.broken.set(false);
        Ok(result)
    }

    /// Sends a message, after its length, to `peers`. Returns the message.
    fn send_message(
        &self,
        peers: Range<usize>,
        message: Vec<u8>,
        operation: Operation,
        patience: Patience,
    ) -> Result<Vec<u8>, MpiError> {
        let bytes = message.len();
        check_length(bytes as u64, self.world.rank(), operation)?;
        let mut transfers = Transfers::new(&self.connection, operation.name);
        let length = transfers.outgoing((bytes as u64).to_le_bytes().to_vec());
        let body = transfers.outgoing(message);
        for peer in peers {
            transfers.send(operation.with(peer), length, 0..LENGTH_BYTES)?;
            transfers.send(operation.with(peer), body, 0..bytes)?;
        }
        let ended = transfers.wait(patience)?;
        Ok(ended.outgoing.into_iter().nth(1).unwrap_or_default())
    }

    /// Receives a message from each of `peers`.
    fn receive_messages(
        &self,
        peers: Range<usize>,
        operation: Operation,
        patience: Patience,
    ) -> Result<Vec<Vec<u8>>, MpiError> {
        let mut transfers = Transfers::new(&self.connection, operation.name);
        for peer in peers.clone() {
            let length = transfers.incoming(vec![0; LENGTH_BYTES]);
            transfers.receive(operation.with(peer), length, 0..LENGTH_BYTES)?;
        }
        let lengths = transfers.wait(patience)?.incoming;
        let mut transfers = Transfers::new(&self.connection, operation.name);
        for (peer, length) in peers.zip(lengths) {
            let length = length.try_into().map_or(u64::MAX, u64::from_le_bytes);
            let bytes = check_length(length, peer, operation)?;
            let body =
                transfers.incoming(room(bytes).ok_or_else(|| too_long(length, peer, operation))?);
            transfers.receive(operation.with(peer), body, 0..bytes)?;
        }
        Ok(transfers.wait(patience)?.incoming)
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
