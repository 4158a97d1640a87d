//! Transfers in flight and the buffers that they read and write.
#![allow(
    unsafe_code,
    reason = "buffers that MPI reads and writes between two polls"
)]

use std::collections::{BTreeSet, VecDeque};
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::ops::Range;

use super::Connection;
use super::error::MpiError;
use super::library::{Envelope, MpiLibrary, Request};
use crate::ranks::Patience;
use crate::ranks::wait::Silence;

/// Bytes of the messages that a range is cut into. Each one that arrives tells that data moves.
const PIECE: usize = 1 << 22;
/// Pieces of a stream that are in flight at once.
const WINDOW: usize = 4;

/// Transfers between this rank and others, with their buffers.
///
/// MPI uses the buffers until a transfer ends, so they belong to this value: [`Self::wait`] gives them back after all
/// transfers have ended. In every other case they are leaked, because MPI may use them as long as the process runs.
#[derive(Debug)]
pub(super) struct Transfers<'m> {
    connection: &'m Connection,
    operation: &'static str,
    outgoing: Vec<Parts>,
    incoming: Vec<Parts>,
    streams: Vec<Stream>,
}

/// A buffer to send from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outgoing(usize);

/// A buffer to receive into.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming(usize);

/// The buffers of transfers that have ended, in the order in which they were given.
#[derive(Debug)]
pub(super) struct Ended {
    /// The buffers that were sent.
    pub(super) outgoing: Vec<Vec<u8>>,
    /// The buffers that were received into.
    pub(super) incoming: Vec<Vec<u8>>,
}

impl<'m> Transfers<'m> {
    /// No transfers yet; `operation` is named in errors.
    pub(super) fn new(connection: &'m Connection, operation: &'static str) -> Self {
        Self {
            connection,
            operation,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            streams: Vec::new(),
        }
    }

    /// Takes a buffer to send from.
    pub(super) fn outgoing(&mut self, buffer: Vec<u8>) -> Outgoing {
        self.outgoing.push(Parts::new(buffer));
        Outgoing(self.outgoing.len() - 1)
    }

    /// Takes a buffer to receive into.
    pub(super) fn incoming(&mut self, buffer: Vec<u8>) -> Incoming {
        self.incoming.push(Parts::new(buffer));
        Incoming(self.incoming.len() - 1)
    }

    /// Starts to send the bytes `range` of a buffer.
    pub(super) fn send(
        &mut self,
        to: Envelope,
        buffer: Outgoing,
        range: Range<usize>,
    ) -> Result<(), MpiError> {
        let (start, left) = self.outgoing[buffer.0].bytes(range);
        self.start(Stream::new(to, Direction::Send, start, left))
    }

    /// Starts to receive into the bytes `range` of a buffer. The ranges of a buffer must be given in ascending order,
    /// without overlap.
    pub(super) fn receive(
        &mut self,
        from: Envelope,
        buffer: Incoming,
        range: Range<usize>,
    ) -> Result<(), MpiError> {
        let parts = &mut self.incoming[buffer.0];
        assert!(range.start >= parts.used, "ranges to receive into overlap");
        parts.used = range.end;
        let (start, left) = parts.bytes(range);
        self.start(Stream::new(from, Direction::Receive, start, left))
    }

    fn start(&mut self, mut stream: Stream) -> Result<(), MpiError> {
        let filled = stream.fill(&self.connection.library);
        filled.map_err(|error| stream.context(error, self.operation))?;
        if !stream.ended() {
            self.streams.push(stream);
        }
        Ok(())
    }

    /// Waits until all transfers have ended, and returns the buffers.
    ///
    /// # Errors
    /// When the patience ends: the error names the ranks whose transfers have not ended. When a message has another length than the
    /// range, or MPI fails. The buffers are leaked.
    pub(super) fn wait(mut self, patience: Patience) -> Result<Ended, MpiError> {
        let mut silence = Silence::new();
        while !self.streams.is_empty() {
            if self.poll()? {
                silence.end();
                continue;
            }
            let waited = silence.pause();
            let mut heartbeats = self.connection.heartbeats.borrow_mut();
            heartbeats.beat(&self.connection.library)?;
            if waited < patience.limit() {
                continue;
            }
            let mut ranks = self.awaited();
            if let Patience::ForLife(limit) = patience {
                ranks.retain(|rank| heartbeats.silence(*rank) >= limit);
            }
            if !ranks.is_empty() {
                return Err(MpiError::NoAnswer {
                    operation: self.operation,
                    ranks,
                    nodes: Vec::new(),
                    waited,
                });
            }
        }
        let vectors = |parts: Vec<Parts>| {
            // SAFETY: no transfer is in flight, and each buffer's parts are used once.
            parts
                .into_iter()
                .map(|parts| unsafe { parts.into_vec() })
                .collect()
        };
        Ok(Ended {
            outgoing: vectors(self.outgoing),
            incoming: vectors(self.incoming),
        })
    }

    /// Ends what has arrived and starts what comes next. Returns whether data moved.
    fn poll(&mut self) -> Result<bool, MpiError> {
        let (mut moved, mut index) = (false, 0);
        while let Some(stream) = self.streams.get_mut(index) {
            let advanced = stream.advance(&self.connection.library, self.operation);
            moved |= advanced.map_err(|error| stream.context(error, self.operation))?;
            if stream.ended() {
                self.streams.swap_remove(index);
            } else {
                index += 1;
            }
        }
        Ok(moved)
    }

    /// The ranks whose transfers have not ended, in ascending order.
    fn awaited(&self) -> Vec<usize> {
        let streams = self.streams.iter();
        let ranks: BTreeSet<_> = streams.map(|stream| stream.envelope.peer).collect();
        ranks.into_iter().collect()
    }
}

/// A vector as raw parts, so that no reference to its bytes exists while MPI uses them.
#[derive(Debug)]
struct Parts {
    start: *mut u8,
    length: usize,
    capacity: usize,
    /// End of the ranges that are received into.
    used: usize,
}

impl Parts {
    fn new(vector: Vec<u8>) -> Self {
        let mut vector = ManuallyDrop::new(vector);
        Self {
            start: vector.as_mut_ptr(),
            length: vector.len(),
            capacity: vector.capacity(),
            used: 0,
        }
    }

    /// First byte and number of bytes of `range`.
    fn bytes(&self, range: Range<usize>) -> (*mut u8, usize) {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "range outside of its buffer"
        );
        // SAFETY: the range lies in the vector.
        let start = unsafe { self.start.add(range.start) };
        (start, range.len())
    }

    /// # Safety
    /// No transfer uses the vector.
    unsafe fn into_vec(self) -> Vec<u8> {
        // SAFETY: these are the parts of a vector, and they are used once.
        unsafe { Vec::from_raw_parts(self.start, self.length, self.capacity) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Send,
    Receive,
}

/// Bytes that go to or come from one rank, in pieces.
#[derive(Debug)]
struct Stream {
    envelope: Envelope,
    direction: Direction,
    /// First byte that no piece in flight has.
    next: *mut u8,
    /// Bytes from there on.
    left: usize,
    /// The pieces in flight, with their lengths in bytes, in the order in which they end.
    pieces: VecDeque<(Request, usize)>,
}

impl Stream {
    fn new(envelope: Envelope, direction: Direction, next: *mut u8, left: usize) -> Self {
        Self {
            envelope,
            direction,
            next,
            left,
            pieces: VecDeque::with_capacity(WINDOW),
        }
    }

    fn ended(&self) -> bool {
        self.left == 0 && self.pieces.is_empty()
    }

    /// Puts pieces in flight until the window is full.
    fn fill(&mut self, library: &MpiLibrary) -> Result<(), MpiError> {
        while self.left > 0 && self.pieces.len() < WINDOW {
            let length = self.left.min(PIECE);
            // SAFETY: the bytes lie in a buffer of the `Transfers` that owns this stream, which frees it only after all
            // streams have ended. No other stream receives into them, and no stream sends from a buffer to receive into.
            let request = unsafe {
                match self.direction {
                    Direction::Send => library.send(self.next, length as c_int, self.envelope),
                    Direction::Receive => {
                        library.receive(self.next, length as c_int, self.envelope)
                    }
                }
            }?;
            self.pieces.push_back((request, length));
            // SAFETY: at most the end of the buffer.
            self.next = unsafe { self.next.add(length) };
            self.left -= length;
        }
        Ok(())
    }

    /// Ends the pieces that have arrived, and starts as many. Returns whether there were any.
    fn advance(&mut self, library: &MpiLibrary, operation: &'static str) -> Result<bool, MpiError> {
        let mut moved = false;
        while let Some((request, expected)) = self.pieces.front_mut() {
            let Some(found) = library.test(request)? else {
                break;
            };
            if self.direction == Direction::Receive && found != *expected {
                return Err(MpiError::Length {
                    operation,
                    rank: self.envelope.peer,
                    expected: *expected,
                    found,
                });
            }
            self.pieces.pop_front();
            moved = true;
        }
        self.fill(library)?;
        Ok(moved)
    }

    /// The error with this stream's operation and peer.
    fn context(&self, error: MpiError, operation: &'static str) -> MpiError {
        match error {
            MpiError::Call {
                function, message, ..
            } => MpiError::Call {
                function,
                during: format!(" in {operation} with rank {}", self.envelope.peer),
                message,
            },
            other => other,
        }
    }
}
