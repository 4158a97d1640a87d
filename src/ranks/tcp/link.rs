//! A connection to another rank: messages, heartbeats, and the end.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::ranks::wait::Silence;

/// Time without a message after which a heartbeat is sent.
const INTERVAL: Duration = Duration::from_millis(500);
/// The most bytes of a message.
const LONGEST: u64 = 1 << 40;
/// Lengths that are no message: a heartbeat, the last word of a rank, and an end with the exit code in the lowest byte.
const HEARTBEAT: u64 = u64::MAX;
const LAST: u64 = u64::MAX - 1;
const ABORT: u64 = 0xffff_ffff_0000_0000;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Something that goes to the other rank.
enum Sent {
    Message(Arc<Vec<u8>>),
    Abort(u8),
}

/// What has come from the other rank.
#[derive(Debug)]
pub(super) enum Arrived {
    Message(Vec<u8>),
    /// The rank ends the job with this exit code.
    Abort(u8),
    /// Nothing more comes, because of this.
    Closed(String),
}

/// A connection to a rank, read and written by threads of its own.
#[derive(Debug)]
pub(super) struct Link {
    sent: Option<Sender<Sent>>,
    arrived: Receiver<Arrived>,
    /// Counts pieces of messages, and these with the heartbeats.
    data: Arc<AtomicU64>,
    signs: Arc<AtomicU64>,
    writer: JoinHandle<()>,
}

impl Link {
    pub(super) fn new(peer: usize, stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let (sent, to_send) = mpsc::channel();
        let (arrives, arrived) = mpsc::channel();
        let (data, signs) = (Arc::default(), Arc::default());
        let reading = stream.try_clone()?;
        let counted = (Arc::clone(&data), Arc::clone(&signs));
        thread::Builder::new()
            .name(format!("from-{peer}"))
            .spawn(move || {
                let cause = match read(reading, &arrives, &counted) {
                    Ok(cause) => cause.to_owned(),
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        "the other side has closed it".to_owned()
                    }
                    Err(error) => error.to_string(),
                };
                let _ = arrives.send(Arrived::Closed(cause));
            })?;
        let writer = thread::Builder::new()
            .name(format!("to-{peer}"))
            .spawn(move || {
                // The reader finds a broken connection too, and says so.
                let _ = write(&stream, &to_send);
            })?;
        Ok(Self {
            sent: Some(sent),
            arrived,
            data,
            signs,
            writer,
        })
    }

    /// Sends a message after those before it. Returns at once.
    pub(super) fn send(&self, message: Arc<Vec<u8>>) {
        self.put(Sent::Message(message));
    }

    /// Tells the rank that the job ends with an exit code.
    pub(super) fn abort(&self, code: u8) {
        self.put(Sent::Abort(code));
    }

    fn put(&self, sent: Sent) {
        if let Some(sender) = &self.sent {
            // What can't be sent is missed by the reader's side of the connection.
            let _ = sender.send(sent);
        }
    }

    /// What has come next, if anything has.
    pub(super) fn take(&self) -> Option<Arrived> {
        self.arrived.try_recv().ok()
    }

    /// Pieces of messages that have come so far.
    pub(super) fn data(&self) -> u64 {
        self.data.load(Ordering::Relaxed)
    }

    /// Pieces of messages and heartbeats that have come so far.
    pub(super) fn signs(&self) -> u64 {
        self.signs.load(Ordering::Relaxed)
    }

    /// Sends what is left and the last word, for at most `limit`.
    pub(super) fn close(&mut self, limit: Duration) {
        drop(self.sent.take());
        let mut silence = Silence::new();
        while !self.writer.is_finished() && silence.pause() < limit {}
    }
}

fn read(
    stream: TcpStream,
    arrives: &Sender<Arrived>,
    (data, signs): &(Arc<AtomicU64>, Arc<AtomicU64>),
) -> io::Result<&'static str> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = [0; 8];
        stream.read_exact(&mut length)?;
        signs.fetch_add(1, Ordering::Relaxed);
        let length = u64::from_le_bytes(length);
        let arrived = match length {
            HEARTBEAT => continue,
            LAST => return Ok("it has ended"),
            length if length <= LONGEST => {
                let mut message = Vec::new();
                let mut left = length as usize;
                while left > 0 {
                    let (start, piece) = (message.len(), left.min(PIECE));
                    message.resize(start + piece, 0);
                    stream.read_exact(&mut message[start..])?;
                    left -= piece;
                    data.fetch_add(1, Ordering::Relaxed);
                    signs.fetch_add(1, Ordering::Relaxed);
                }
                Arrived::Message(message)
            }
            length if length & !0xff == ABORT => Arrived::Abort(length as u8),
            _ => return Err(io::Error::other("it sends something else than messages")),
        };
        data.fetch_add(1, Ordering::Relaxed);
        if arrives.send(arrived).is_err() {
            return Ok("nobody reads it");
        }
    }
}

fn write(stream: &TcpStream, to_send: &Receiver<Sent>) -> io::Result<()> {
    let mut writer = BufWriter::new(stream);
    loop {
        match to_send.recv_timeout(INTERVAL) {
            Ok(Sent::Message(message)) => {
                writer.write_all(&(message.len() as u64).to_le_bytes())?;
                writer.write_all(&message)?;
            }
            Ok(Sent::Abort(code)) => writer.write_all(&(ABORT | u64::from(code)).to_le_bytes())?,
            Err(RecvTimeoutError::Timeout) => writer.write_all(&HEARTBEAT.to_le_bytes())?,
            Err(RecvTimeoutError::Disconnected) => {
                writer.write_all(&LAST.to_le_bytes())?;
                writer.flush()?;
                return stream.shutdown(Shutdown::Write);
            }
        }
        writer.flush()?;
    }
}
