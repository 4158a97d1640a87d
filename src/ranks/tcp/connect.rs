//! How the ranks find each other: all call rank 0, which tells each where the others listen; each then calls the ranks below it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::TcpError;
use crate::ranks::Rank;
use crate::ranks::error::named_ranks;

/// The first bytes of every connection, with the version of what follows.
const GREETING: &[u8; 16] = b"coffey ranks 001";
/// Time between two attempts to reach a rank.
const PAUSE: Duration = Duration::from_millis(100);
/// Time after which a rank says what it waits for.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// Time in which a caller has to say who it is.
const SHORT: Duration = Duration::from_secs(10);

/// A rank that has called: the greeting, then these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    rank: u32,
    world: u32,
    /// Port at which it listens itself.
    port: u16,
}

impl Hello {
    fn write(self, stream: &mut TcpStream) -> io::Result<()> {
        let mut bytes = GREETING.to_vec();
        bytes.extend(self.rank.to_le_bytes());
        bytes.extend(self.world.to_le_bytes());
        bytes.extend(self.port.to_le_bytes());
        stream.write_all(&bytes)
    }

    /// The numbers of a caller; `None` if it is none of coffey's.
    fn read(stream: &mut TcpStream) -> Option<Self> {
        stream.set_read_timeout(Some(SHORT)).ok()?;
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting).ok()?;
        let (mut rank, mut world, mut port) = ([0; 4], [0; 4], [0; 2]);
        stream.read_exact(&mut rank).ok()?;
        stream.read_exact(&mut world).ok()?;
        stream.read_exact(&mut port).ok()?;
        stream.set_read_timeout(None).ok()?;
        (greeting == *GREETING).then(|| Self {
            rank: u32::from_le_bytes(rank),
            world: u32::from_le_bytes(world),
            port: u16::from_le_bytes(port),
        })
    }
}

/// A wait for other ranks at the start.
struct Start<'a> {
    begun: Instant,
    limit: Duration,
    said: Cell<bool>,
    say: &'a dyn Fn(String),
}

impl Start<'_> {
    /// Says once what is waited for, if it takes long. Returns whether the time is over.
    fn is_over(&self, wait: impl FnOnce() -> String) -> bool {
        if self.begun.elapsed() >= SAID_AFTER && !self.said.replace(true) {
            (self.say)(wait());
        }
        self.begun.elapsed() >= self.limit
    }
}

/// Connects `rank` to all others; `master` is host and port of rank 0. Returns the connections by rank.
pub(super) fn connect(
    rank: Rank,
    (host, port): &(String, u16),
    limit: Duration,
    say: &dyn Fn(String),
) -> Result<BTreeMap<usize, TcpStream>, TcpError> {
    let begun = Instant::now();
    let start = Start {
        begun,
        limit,
        said: Cell::new(false),
        say,
    };
    let address = format!("{host}:{port}");
    if rank.leads() {
        let listener = listen(host, *port).map_err(|source| TcpError::Listen {
            address: address.clone(),
            source,
        })?;
        let callers: Vec<usize> = (1..rank.world).collect();
        let called = accept(&listener, rank, &callers, &start)?;
        let mut table = Vec::new();
        for (stream, hello) in called.values() {
            let ip = stream
                .peer_addr()
                .map_err(|e| unreachable(0, &address, begun, e))?;
            table.push(SocketAddr::new(ip.ip(), hello.port).to_string());
        }
        let table = table.join("\n");
        let mut connections = BTreeMap::new();
        for (caller, (mut stream, _)) in called {
            write_text(&mut stream, &table)
                .map_err(|source| unreachable(caller, "its call", begun, source))?;
            connections.insert(caller, stream);
        }
        return Ok(connections);
    }
    let call = |other: usize, address: &str, port: u16| {
        let mut stream = reach(other, address, &start)?;
        let hello = Hello {
            rank: rank.index as u32,
            world: rank.world as u32,
            port,
        };
        let sent = hello.write(&mut stream);
        sent.map_err(|source| unreachable(other, address, begun, source))?;
        Ok(stream)
    };
    let failed = |source| unreachable(0, &address, begun, source);
    let listener = loop {
        match listen_for(&address) {
            Ok(listener) => break listener,
            Err(source) if start.is_over(|| waits_for(0, &address, &source)) => {
                return Err(failed(source));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    };
    let own_port = listener.local_addr().map_err(failed)?.port();
    let mut first = call(0, &address, own_port)?;
    let table = read_text(&mut first, limit).map_err(failed)?;
    let table: Vec<&str> = table.lines().collect();
    let mut connections = BTreeMap::from([(0, first)]);
    for other in 1..rank.index {
        let address = table.get(other - 1).copied().unwrap_or_default();
        connections.insert(other, call(other, address, own_port)?);
    }
    let callers: Vec<usize> = (rank.index + 1..rank.world).collect();
    let called = accept(&listener, rank, &callers, &start)?;
    connections.extend(
        called
            .into_iter()
            .map(|(caller, (stream, _))| (caller, stream)),
    );
    Ok(connections)
}

/// Listens at the port: on loopback if the host is there, else on every interface, because the host's name may be that of a service.
fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let found = (host, port).to_socket_addrs()?.next();
    let found = found.ok_or_else(|| io::Error::other("the host has no address"))?;
    let ip = match found.ip() {
        loopback if loopback.is_loopback() => loopback,
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    TcpListener::bind((ip, port))
}

/// Listens at any port of the interface that leads to `address`: rank 0 sees this rank there, and so can the others reach it.
fn listen_for(address: &str) -> io::Result<TcpListener> {
    let found = address.to_socket_addrs()?.next();
    let found = found.ok_or_else(|| io::Error::other("the host has no address"))?;
    let any = match found {
        SocketAddr::V4(_) => IpAddr::from([0; 4]),
        SocketAddr::V6(_) => IpAddr::from([0; 16]),
    };
    // Connecting such a socket sends nothing.
    let probe = UdpSocket::bind((any, 0))?;
    probe.connect(found)?;
    TcpListener::bind((probe.local_addr()?.ip(), 0))
}

/// Accepts a connection from each of `callers`.
fn accept(
    listener: &TcpListener,
    rank: Rank,
    callers: &[usize],
    start: &Start<'_>,
) -> Result<BTreeMap<usize, (TcpStream, Hello)>, TcpError> {
    let failed = |source| TcpError::Listen {
        address: listener
            .local_addr()
            .map_or_else(|_| String::new(), |a| a.to_string()),
        source,
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let mut found = BTreeMap::new();
    while found.len() < callers.len() {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let missing = callers.iter().filter(|caller| !found.contains_key(*caller));
                let missing: Vec<usize> = missing.copied().collect();
                if start.is_over(|| format!("waiting for {}", named_ranks(&missing, &[]))) {
                    return Err(TcpError::Absent {
                        ranks: missing,
                        waited: start.begun.elapsed(),
                    });
                }
                thread::sleep(PAUSE / 10);
                continue;
            }
            Err(source) => return Err(failed(source)),
        };
        stream.set_nonblocking(false).map_err(failed)?;
        // A caller that does not greet is none of coffey's.
        let Some(hello) = Hello::read(&mut stream) else {
            continue;
        };
        let caller = hello.rank as usize;
        if hello.world as usize != rank.world || !callers.contains(&caller) {
            return Err(TcpError::Stranger(format!(
                "rank {caller} of {} has called rank {} of {}: start all ranks with the same number of ranks, and one job at MASTER_PORT",
                hello.world, rank.index, rank.world
            )));
        }
        if found.insert(caller, (stream, hello)).is_some() {
            return Err(TcpError::Stranger(format!(
                "two processes say that they are rank {caller} of {}: give each another rank",
                rank.world
            )));
        }
    }
    Ok(found)
}

/// Calls a rank until it answers.
fn reach(other: usize, address: &str, start: &Start<'_>) -> Result<TcpStream, TcpError> {
    loop {
        // The name of a host may be known later than this rank begins.
        let connected = address.to_socket_addrs().and_then(|mut found| {
            let found = found.next();
            let found = found.ok_or_else(|| io::Error::other("the host has no address"))?;
            TcpStream::connect_timeout(&found, SHORT)
        });
        match connected {
            Ok(stream) => return Ok(stream),
            Err(source) if start.is_over(|| waits_for(other, address, &source)) => {
                return Err(unreachable(other, address, start.begun, source));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

fn waits_for(rank: usize, address: &str, cause: &io::Error) -> String {
    format!("waiting for rank {rank} at {address} ({cause})")
}

fn unreachable(rank: usize, address: &str, begun: Instant, source: io::Error) -> TcpError {
    TcpError::Connect {
        rank,
        address: address.to_owned(),
        waited: begun.elapsed(),
        source,
    }
}

fn write_text(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(&(text.len() as u32).to_le_bytes())?;
    stream.write_all(text.as_bytes())
}

fn read_text(stream: &mut TcpStream, limit: Duration) -> io::Result<String> {
    stream.set_read_timeout(Some(limit.max(SHORT)))?;
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut text = String::new();
    let length = u64::from(u32::from_le_bytes(length));
    stream.take(length).read_to_string(&mut text)?;
    stream.set_read_timeout(None)?;
    Ok(text)
}
