//! An HTTP proxy in front of a real S3 server that injects faults, request by request.
//!
//! The proxy implements the part of HTTP that S3 clients use: it passes heads on line by line and counts bodies in
//! bytes. It keeps connections alive, as S3 does, unless a fault ends them.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};

/// A fault of one request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Answer with a status and an S3 error code, without asking the server.
    Status(u16, &'static str),
    /// Close the connection normally before the first byte of an answer, as at the end of a kept-alive connection.
    Hangup,
    /// Reset the connection after this many bytes, including the head.
    Reset(usize),
    /// Send nothing after this many bytes, including the head, and keep the connection open.
    Stall(usize),
    /// Announce the whole body and close the connection normally after this many bytes of it.
    Short(usize),
    /// Send this many bytes of the body at a time, with a pause after each.
    Trickle(usize, Duration),
    /// Reset the connection when a write to the client takes longer than this.
    Impatient(Duration),
    /// Announce this many bytes more than there are.
    Longer(u64),
    /// Announce this many bytes fewer than there are, and send all.
    Shorter(u64),
    /// Answer with another ETag.
    OtherVersion,
    /// Ask the server for the whole object, without the range.
    IgnoreRange,
    /// Pass on this many bytes of the request's body, then reset the connection.
    CutOff(usize),
    /// Let the server handle the request and close before the first byte of its answer.
    Unanswered,
}

/// Chooses a fault by the request's head in lower case and the number of earlier requests for the same object.
pub(crate) type Rule = Box<dyn FnMut(&str, usize) -> Option<Fault> + Send>;

struct State {
    upstream: SocketAddr,
    rule: Mutex<Rule>,
    requests: Mutex<Vec<String>>,
    /// The number of requests by first line.
    seen: Mutex<HashMap<String, usize>>,
}

/// The running proxy, which ends with its runtime.
pub(crate) struct Proxy {
    pub(crate) endpoint: String,
    address: SocketAddr,
    runtime: Handle,
    state: Arc<State>,
    task: Mutex<JoinHandle<()>>,
}

impl Proxy {
    pub(crate) fn start(runtime: &Handle, upstream: SocketAddr, rule: Rule) -> Self {
        let state = Arc::new(State {
            upstream,
            rule: Mutex::new(rule),
            requests: Mutex::default(),
            seen: Mutex::default(),
        });
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        Self {
            endpoint: format!("http://{address}"),
            address,
            runtime: runtime.clone(),
            task: Mutex::new(runtime.spawn(accept(listener, Arc::clone(&state)))),
            state,
        }
    }

    /// The heads of all requests so far, in lower case.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap().clone()
    }

    /// Sets the rule from the next request on and forgets earlier requests.
    pub(crate) fn follow(&self, rule: Rule) {
        *self.state.rule.lock().unwrap() = rule;
        self.state.seen.lock().unwrap().clear();
        self.state.requests.lock().unwrap().clear();
    }

    /// Ends every connection and refuses new ones for `time`.
    pub(crate) fn away_for(&self, time: Duration) {
        let mut task = self.task.lock().unwrap();
        task.abort();
        let (address, state) = (self.address, Arc::clone(&self.state));
        *task = self.runtime.spawn(async move {
            tokio::time::sleep(time).await;
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(address).unwrap();
            accept(socket.listen(64).unwrap(), state).await;
        });
    }
}

/// No faults.
pub(crate) fn clean() -> Rule {
    Box::new(|_, _| None)
}

/// The given faults in order, then none; `None` passes a request on.
pub(crate) fn script(faults: impl IntoIterator<Item = Option<Fault>>) -> Rule {
    let mut faults: VecDeque<_> = faults.into_iter().collect();
    Box::new(move |_, _| faults.pop_front().flatten())
}

/// A temporary fault of any kind on `share` of the requests, anywhere in objects of about `size` bytes.
/// Which request fails depends on the object and the request's number alone, not on timing.
pub(crate) fn chance(seed: u64, share: f64, size: usize) -> Rule {
    let mut bursts: HashMap<String, usize> = HashMap::new();
    Box::new(move |head, nth| {
        let target = head.lines().next().unwrap_or_default().to_owned();
        let mut hasher = DefaultHasher::new();
        (seed, &target, nth).hash(&mut hasher);
        let mut random = fastrand::Rng::with_seed(hasher.finish());
        let burst = bursts.entry(target).or_default();
        if *burst > 0 {
            *burst -= 1;
            return Some(Fault::Status(503, "SlowDown"));
        }
        if random.f64() >= share {
            return None;
        }
        let at = random.usize(0..size);
        let few = random.usize(1..512);
        let ranged = head.contains("\nrange:");
        Some(match random.u8(0..11) {
            0 => {
                *burst = random.usize(0..3);
                Fault::Status(503, "SlowDown")
            }
            1 => Fault::Status(500, "InternalError"),
            2 => Fault::Status(429, "TooManyRequests"),
            3 => Fault::Hangup,
            4 => Fault::Reset(at),
            5 => Fault::Stall(at),
            6 => Fault::Short(at),
            7 => Fault::Trickle(1 + size / 20, Duration::from_millis(2)),
            // Without a range, the client has only this length to compare with.
            8 if ranged => Fault::Longer(few as u64),
            9 if ranged => Fault::Shorter(few as u64),
            10 if ranged => Fault::IgnoreRange,
            _ => Fault::Short(at),
        })
    })
}

/// A temporary fault on `share` of the requests that write objects of about `size` bytes.
pub(crate) fn chance_writing(seed: u64, share: f64, size: usize) -> Rule {
    let mut random = fastrand::Rng::with_seed(seed);
    Box::new(move |head, _| {
        if random.f64() >= share {
            return None;
        }
        let at = random.usize(0..size);
        let writes = ["put ", "post ", "delete "]
            .iter()
            .any(|method| head.starts_with(method));
        Some(match random.u8(0..7) {
            0 => Fault::Status(503, "SlowDown"),
            1 => Fault::Status(500, "InternalError"),
            2 => Fault::Hangup,
            3 if writes => Fault::Reset(random.usize(0..200)),
            4 if writes => Fault::Unanswered,
            5 if head.starts_with("put ") => Fault::CutOff(at),
            _ => Fault::Short(at),
        })
    })
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    // Dropping the set ends the connections together with this task.
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(serve(BufReader::new(socket), Arc::clone(&state)));
    }
}

/// The lines before the empty one; `None` at the end of the connection.
async fn read_head(socket: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if socket.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => return Some(lines),
            text => lines.push(text.to_owned()),
        }
    }
}

fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn set(head: &mut Vec<String>, name: &str, value: Option<String>) {
    head.retain(|line| {
        line.split_once(':')
            .is_none_or(|(found, _)| !found.eq_ignore_ascii_case(name))
    });
    head.extend(value.map(|value| format!("{name}: {value}")));
}

fn text(head: &[String]) -> Vec<u8> {
    format!("{}\r\n\r\n", head.join("\r\n")).into_bytes()
}

async fn serve(mut client: BufReader<TcpStream>, state: Arc<State>) {
    while let Some(request) = read_head(&mut client).await {
        let lower = request.join("\n").to_lowercase();
        let nth = {
            let mut seen = state.seen.lock().unwrap();
            let count = seen.entry(request[0].clone()).or_default();
            *count += 1;
            *count - 1
        };
        let fault = (state.rule.lock().unwrap())(&lower, nth);
        state.requests.lock().unwrap().push(lower);
        if answer(&mut client, &state, request, fault).await.is_none() {
            return;
        }
    }
}

/// Answers one request; `None` if the connection ended.
async fn answer(
    client: &mut BufReader<TcpStream>,
    state: &State,
    mut request: Vec<String>,
    fault: Option<Fault>,
) -> Option<()> {
    if header(&request, "expect").is_some() {
        set(&mut request, "expect", None);
        let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
        client.get_mut().write_all(go_on).await.ok()?;
    }
    let to_send: usize = header(&request, "content-length")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    match fault {
        Some(Fault::Status(status, code)) => {
            drain(client, to_send).await?;
            let body =
                format!("<Error><Code>{code}</Code><Message>from the test</Message></Error>");
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/xml\r\nx-amz-bucket-region: eu-west-1\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            return client.get_mut().write_all(answer.as_bytes()).await.ok();
        }
        Some(Fault::Hangup) => return None,
        Some(Fault::IgnoreRange) => set(&mut request, "range", None),
        _ => {}
    }
    let mut upstream = BufReader::new(TcpStream::connect(state.upstream).await.ok()?);
    set(&mut request, "connection", Some("close".to_owned()));
    upstream.get_mut().write_all(&text(&request)).await.ok()?;
    let pass = match fault {
        Some(Fault::CutOff(bytes)) => to_send.min(bytes),
        _ => to_send,
    };
    let passed = tokio::io::copy(&mut client.take(pass as u64), upstream.get_mut()).await;
    if passed.ok()? < to_send as u64 {
        client.get_ref().set_zero_linger().ok()?;
        return None;
    }
    let mut head = read_head(&mut upstream).await?;
    if let Some(Fault::Unanswered) = fault {
        return None;
    }
    set(&mut head, "connection", None);
    let length: Option<u64> = header(&head, "content-length").and_then(|text| text.parse().ok());
    let claimed = match fault {
        Some(Fault::Longer(more)) => length.map(|length| length + more),
        Some(Fault::Shorter(fewer)) => length.map(|length| length.saturating_sub(fewer)),
        _ => length,
    };
    if claimed != length {
        set(&mut head, "content-length", claimed.map(|n| n.to_string()));
    }
    if let Some(Fault::OtherVersion) = fault {
        set(&mut head, "etag", Some("\"other\"".to_owned()));
    }
    let head = text(&head);
    let limit = match fault {
        Some(Fault::Reset(bytes) | Fault::Stall(bytes)) => bytes,
        Some(Fault::Short(bytes)) => head.len() + bytes,
        _ => usize::MAX,
    };
    let mut sent = 0;
    let mut piece = head;
    while !piece.is_empty() {
        let part = &piece[..piece.len().min(limit - sent)];
        send(client.get_mut(), part, fault.as_ref().filter(|_| sent > 0)).await?;
        sent += part.len();
        if sent == limit {
            return end(client, &fault).await;
        }
        piece.resize(16 << 10, 0);
        let read = upstream.read(&mut piece).await.ok()?;
        piece.truncate(read);
    }
    // Without a length, the body ends with the connection.
    (claimed.is_some() && claimed == length).then_some(())
}

/// Reads the body of a request and drops it.
async fn drain(client: &mut BufReader<TcpStream>, bytes: usize) -> Option<()> {
    let mut body = client.take(bytes as u64);
    tokio::io::copy(&mut body, &mut tokio::io::sink())
        .await
        .ok()?;
    Some(())
}

async fn send(client: &mut TcpStream, bytes: &[u8], fault: Option<&Fault>) -> Option<()> {
    match fault {
        Some(Fault::Trickle(size, pause)) => {
            for piece in bytes.chunks(*size) {
                client.write_all(piece).await.ok()?;
                tokio::time::sleep(*pause).await;
            }
            Some(())
        }
        Some(Fault::Impatient(patience)) => {
            let write = tokio::time::timeout(*patience, client.write_all(bytes));
            if write.await.is_err() {
                client.set_zero_linger().ok()?;
                return None;
            }
            Some(())
        }
        _ => client.write_all(bytes).await.ok(),
    }
}

async fn end(client: &mut BufReader<TcpStream>, fault: &Option<Fault>) -> Option<()> {
    match fault {
        Some(Fault::Reset(_)) => client.get_ref().set_zero_linger().ok()?,
        // Waits until the client closes the connection.
        Some(Fault::Stall(_)) => {
            client.read_u8().await.ok();
        }
        _ => {}
    }
    None
}
