//! The HTTP server: the page with its events and its grid, `/metrics` and `/healthz`.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use futures_lite::stream::{self, Stream};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

use super::connections::{self, Limits, PageMark};
use super::history::Mark;
use super::prometheus::{self, TEXT_FORMAT};
use super::status::{PageUpdate, RunStatus};
use super::{Monitor, Stalled, page};

/// Time between two events. They also serve as keep-alive messages.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// Most pages open at once, and at most half of the connections.
const MAX_PAGES: usize = 32;
/// Longest wait for open pages to receive the last event.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(300);

/// The running server. On drop it sends open pages the end of the run.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    runtime: Handle,
    over: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct ServerState {
    monitor: Monitor,
    policy: HeaderValue,
    /// Status at the newest second. A slow page misses some; none are stored for it.
    status: watch::Receiver<Arc<RunStatus>>,
    pages: Arc<Semaphore>,
    most_pages: usize,
}

impl Server {
    /// Listens on `listen` (port 0: any free port) and answers from `monitor` on `runtime`. Also installs the process's
    /// metrics recorder.
    ///
    /// # Errors
    /// The system's error if the address can't be used.
    pub fn start(listen: SocketAddr, monitor: Monitor, runtime: &Handle) -> std::io::Result<Self> {
        let listener = runtime.block_on(TcpListener::bind(listen))?;
        let address = listener.local_addr()?;
        prometheus::event_recorder();
        let policy = HeaderValue::try_from(page::policy()).map_err(std::io::Error::other)?;
        let limits = Limits::of_process();
        let most_pages = MAX_PAGES.min(limits.connections / 2);
        let (publisher, status) = watch::channel(Arc::new(monitor.status()));
        let mut router = Router::new()
            .route("/", get(flow_page))
            .route("/events", get(events))
            .route("/grid.png", get(grid))
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .with_state(ServerState {
                monitor: monitor.clone(),
                policy,
                status,
                pages: Arc::new(Semaphore::new(most_pages)),
                most_pages,
            })
            .layer(from_fn(add_headers));
        if address.ip().is_loopback() {
            router = router.layer(from_fn_with_state(address, only_local_names));
        }
        let (over, end) = oneshot::channel();
        let published = publish(monitor, publisher, end);
        let task = runtime.spawn(connections::serve(listener, router, limits, published));
        Ok(Self {
            address,
            runtime: runtime.clone(),
            over: Some(over),
            task,
        })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The end is signalled by dropping the sender.
        drop(self.over.take());
        let shutdown = async { tokio::time::timeout(SHUTDOWN_TIMEOUT, &mut self.task).await };
        // A server that is too slow is aborted.
        self.runtime.block_on(shutdown).ok();
        self.task.abort();
    }
}

/// Publishes the status of the run for all pages once a second, until the end.
async fn publish(
    monitor: Monitor,
    status: watch::Sender<Arc<RunStatus>>,
    mut end: oneshot::Receiver<()>,
) {
    while tokio::time::timeout(EVENT_INTERVAL, &mut end)
        .await
        .is_err()
    {
        status.send_replace(Arc::new(monitor.status()));
    }
    status.send_replace(Arc::new(monitor.status()));
}

/// Rejects requests whose `Host` is not a local name: protection against DNS rebinding, by which a page of another site could
/// read from this machine.
async fn only_local_names(
    State(address): State<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let host = request.headers().get(header::HOST);
    if host.is_none_or(|host| host.to_str().is_ok_and(is_local_name)) {
        return next.run(request).await;
    }
    let text = format!("served on this machine only: ask for http://{address}/\n");
    (StatusCode::MISDIRECTED_REQUEST, text).into_response()
}

/// Whether a `Host` is an address or `localhost`, with or without a port.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

/// Adds the headers of every response: no caching, no content sniffing, no referrer.
async fn add_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        let headers = response.headers_mut();
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn flow_page(State(server): State<ServerState>) -> Response {
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    let headers = [
        (header::CONTENT_TYPE, html),
        (header::CONTENT_SECURITY_POLICY, server.policy),
    ];
    (headers, page::HTML).into_response()
}

async fn grid(State(server): State<ServerState>) -> Response {
    // The path comes from the run, never from the request.
    let path = server
        .monitor
        .reported()
        .grid
        .as_ref()
        .map(|g| g.path.clone());
    let Some(path) = path else {
        return (StatusCode::NOT_FOUND, "no grid was drawn yet\n").into_response();
    };
    match tokio::fs::read(path).await {
        Ok(png) => ([(header::CONTENT_TYPE, "image/png")], png).into_response(),
        Err(error) => {
            let text = format!("the grid can't be read: {error}\n");
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

async fn events(
    State(server): State<ServerState>,
    Extension(page): Extension<PageMark>,
) -> Response {
    match Arc::clone(&server.pages).try_acquire_owned() {
        Ok(permit) => {
            page.set();
            Sse::new(updates(server, permit)).into_response()
        }
        Err(_full) => {
            let text = format!("{} pages are open already\n", server.most_pages);
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

/// The state of one open page.
struct OpenPage {
    server: ServerState,
    /// The points of the curves that the page has.
    mark: Mark,
    begun: bool,
    _permit: OwnedSemaphorePermit,
}

/// The events of one page: all curves first, new points every second, and `end` when the run is over. An event is made after
/// the page has taken the one before.
fn updates(
    server: ServerState,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let page = OpenPage {
        server,
        mark: Mark::default(),
        begun: false,
        _permit: permit,
    };
    stream::unfold(Some(page), |page| async move {
        let mut page = page?;
        if page.begun && page.server.status.changed().await.is_err() {
            // Browsers ignore events without data.
            return Some((Ok(Event::default().event("end").data("over")), None));
        }
        page.begun = true;
        let status = Arc::clone(&page.server.status.borrow_and_update());
        let update = PageUpdate {
            status: &status,
            curves: page.server.monitor.curves(&mut page.mark),
        };
        // Numbers and text always serialise.
        let json = serde_json::to_string(&update).unwrap_or_default();
        let event = Event::default().data(json);
        Some((Ok(event), Some(page)))
    })
}

async fn metrics(State(server): State<ServerState>) -> Response {
    let headers = [(header::CONTENT_TYPE, TEXT_FORMAT)];
    (headers, server.monitor.prometheus()).into_response()
}

async fn healthz(State(server): State<ServerState>) -> (StatusCode, String) {
    match server.monitor.stalled() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(Stalled { seconds, stage }) => {
            let text = format!("nothing came for {seconds} s: the {stage} stage hangs\n");
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_check_accepts_only_local_names() {
        for local in [
            "127.0.0.1:9464",
            "localhost",
            "LocalHost:1",
            "[::1]:9464",
            "10.0.0.7",
        ] {
            assert!(is_local_name(local), "{local}");
        }
        for strange in [
            "evil.example:9464",
            "localhost.evil.example",
            "127.0.0.1.evil.example:1",
            "",
        ] {
            assert!(!is_local_name(strange), "{strange}");
        }
    }
}
