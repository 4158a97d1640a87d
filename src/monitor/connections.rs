//! The connections of the server. Their number, their time and the time without progress are limited: each takes an open file,
//! and the run needs those for its data.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::{Extension, Router};
use coffey_pipeline::open_files;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;

/// Largest header of a request. Bytes.
const HEADER_BYTES: usize = 64 << 10;
/// Most connections at once, where the limit of open files is high.
const MOST_CONNECTIONS: u64 = 64;
/// Fewest connections that are let in.
const LEAST_CONNECTIONS: u64 = 4;
/// Open files that the process may have for each connection.
const FILES_A_CONNECTION: u64 = 16;

/// Limits of the connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most connections at once.
    pub(super) connections: usize,
    /// Longest wait for the whole header of a request.
    header: Duration,
    /// Longest life of a connection that is no open page.
    life: Duration,
    /// Longest wait for a client to take more of an answer.
    write: Duration,
}

impl Limits {
    /// The limits of this process: a connection for each sixteen open files that it may have, within bounds.
    pub(super) fn of_process() -> Self {
        let most =
            (open_files::limit() / FILES_A_CONNECTION).clamp(LEAST_CONNECTIONS, MOST_CONNECTIONS);
        Self {
            connections: most as usize,
            header: Duration::from_secs(10),
            life: Duration::from_secs(30),
            write: Duration::from_secs(30),
        }
    }
}

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 26\r\nconnection: close\r\n\r\n\
    too many connections open\n";

/// Whether a connection is an open page, which lives until the end of the run.
#[derive(Clone, Debug, Default)]
pub(super) struct PageMark(Arc<AtomicBool>);

impl PageMark {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Answers connections from `router` until `end`, then waits for the open ones.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    end: impl Future<Output = ()> + Send,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let mut open = JoinSet::new();
    let mut end = std::pin::pin!(end);
    loop {
        let socket = tokio::select! {
            socket = open_files::accept(&listener) => socket,
            () = &mut end => break,
        };
        while open.try_join_next().is_some() {}
        match Arc::clone(&slots).try_acquire_owned() {
            Ok(slot) => {
                open.spawn(answer(socket, router.clone(), limits, slot));
            }
            Err(_full) => refuse(socket),
        }
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

/// Answers the one request of a connection.
async fn answer(socket: TcpStream, router: Router, limits: Limits, _slot: OwnedSemaphorePermit) {
    let mut socket = TimeoutStream::new(socket);
    socket.set_write_timeout(Some(limits.write));
    let page = PageMark::default();
    let service = TowerToHyperService::new(router.layer(Extension(page.clone())));
    let mut http = Builder::new(TokioExecutor::new()).http1_only();
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header)
        .max_buf_size(HEADER_BYTES)
        .keep_alive(false);
    let too_long = async {
        tokio::time::sleep(limits.life).await;
        if page.is_set() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        // A failed connection ends alone.
        _ = http.serve_connection(TokioIo::new(Box::pin(socket)), service) => {}
        () = too_long => {}
    }
}

/// Answers a connection beyond the limit, as far as that needs no wait, and closes it.
fn refuse(socket: TcpStream) {
    if let Ok(mut socket) = socket.into_std() {
        socket.write_all(TOO_MANY).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpStream};
    use std::thread::sleep;
    use std::time::Instant;

    use axum::body::Body;
    use axum::routing::get;
    use tokio::runtime::Runtime;

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_secs(60);

    /// A server of `/`, of an answer without end at `/page`, and of a large answer at `/large`.
    fn start(limits: Limits) -> (Runtime, SocketAddr) {
        let endless = || {
            Body::from_stream(futures_lite::stream::unfold((), |()| async {
                tokio::time::sleep(SHORT / 10).await;
                Some((Ok::<_, std::io::Error>("on\n"), ()))
            }))
        };
        let router = Router::new()
            .route("/", get(|| async { "ok\n" }))
            .route("/large", get(|| async { vec![b'x'; 64 << 20] }))
            .route(
                "/page",
                get(move |Extension(page): Extension<PageMark>| async move {
                    page.set();
                    endless()
                }),
            )
            .route("/slow", get(move || async move { endless() }));
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(serve(listener, router, limits, std::future::pending()));
        (runtime, address)
    }

    fn open(address: SocketAddr, text: &str) -> TcpStream {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket.write_all(text.as_bytes()).unwrap();
        socket
    }

    /// The status of the answer to a request.
    fn status(address: SocketAddr) -> String {
        let mut answer = String::new();
        let mut socket = open(address, "GET / HTTP/1.1\r\nhost: h\r\n\r\n");
        // A refused connection may be reset before its answer is read.
        socket.read_to_string(&mut answer).ok();
        answer.split(' ').nth(1).unwrap_or("503").to_owned()
    }

    /// Waits until the only connection that the limits let in is free again.
    fn wait_until_free(address: SocketAddr) {
        let begin = Instant::now();
        while status(address) != "200" {
            assert!(begin.elapsed() < LONG);
            sleep(SHORT / 10);
        }
    }

    fn one_connection() -> Limits {
        Limits {
            connections: 1,
            header: LONG,
            life: LONG,
            write: LONG,
        }
    }

    #[test]
    fn connections_beyond_the_limit_are_refused_and_idle_ones_end() {
        let limits = Limits {
            header: SHORT,
            ..one_connection()
        };
        let (_runtime, address) = start(limits);
        let mut idle = open(address, "");
        let mut refused = String::new();
        open(address, "").read_to_string(&mut refused).unwrap();
        assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
        assert!(
            refused.ends_with("\r\n\r\ntoo many connections open\n"),
            "{refused}"
        );
        let mut rest = Vec::new();
        idle.read_to_end(&mut rest).unwrap();
        wait_until_free(address);
    }

    #[test]
    fn connection_with_a_slow_header_ends() {
        let limits = Limits {
            header: SHORT,
            ..one_connection()
        };
        let (_runtime, address) = start(limits);
        let mut slow = open(address, "GET / HTTP/1.1\r\n");
        let begin = Instant::now();
        // Writing fails some time after the server has closed the connection.
        while slow.write_all(b"x: y\r\n").is_ok() {
            assert!(begin.elapsed() < LONG);
            sleep(SHORT / 10);
        }
        wait_until_free(address);
    }

    #[test]
    fn connection_whose_client_never_reads_ends() {
        let limits = Limits {
            write: SHORT,
            ..one_connection()
        };
        let (_runtime, address) = start(limits);
        let _silent = open(address, "GET /large HTTP/1.1\r\nhost: h\r\n\r\n");
        wait_until_free(address);
    }

    #[test]
    fn connection_ends_with_its_time_unless_it_is_a_page() {
        let limits = Limits {
            life: SHORT,
            ..one_connection()
        };
        let (_runtime, address) = start(limits);
        let request =
            |path: &str| open(address, &format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n"));
        let mut slow = Vec::new();
        request("/slow").read_to_end(&mut slow).unwrap();
        wait_until_free(address);
        let mut page = request("/page");
        let (begin, mut piece) = (Instant::now(), [0; 64]);
        while begin.elapsed() < 5 * SHORT {
            assert_ne!(page.read(&mut piece).unwrap(), 0);
        }
    }
}
