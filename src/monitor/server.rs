//! The HTTP side: the page with its events and its picture, `/metrics` and `/healthz`.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_lite::stream::{self, Stream};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

use super::history::Mark;
use super::status::{Status, Update};
use super::{Monitor, Stalled, page};

/// What Prometheus asks for by this name.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Between two events. Each shows that the connection lives: there are no others for that.
const EVERY: Duration = Duration::from_secs(1);
/// Pages that are open at once, at most.
const PAGES: usize = 32;
/// How long the end of a command waits for pages to be told of it.
const FAREWELL: Duration = Duration::from_millis(300);

/// Answers until it is dropped; then open pages are told that the run is over.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    runtime: Handle,
    over: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Sources {
    monitor: Monitor,
    registry: Arc<Registry>,
    policy: HeaderValue,
    /// How the run was at the newest second. One that is slow to read misses some; nothing is kept for it.
    news: watch::Receiver<Arc<Status>>,
    pages: Arc<Semaphore>,
}

impl Server {
    /// Listens on `listen`, where port 0 is any free one, and answers from `monitor` on `runtime`.
    ///
    /// # Errors
    /// The system's, when the address can't be listened on.
    pub fn start(listen: SocketAddr, monitor: Monitor, runtime: &Handle) -> std::io::Result<Self> {
        let listener = runtime.block_on(TcpListener::bind(listen))?;
        let address = listener.local_addr()?;
        let mut registry = Registry::default();
        registry.register_collector(Box::new(monitor.clone()));
        let policy = HeaderValue::try_from(page::policy()).map_err(std::io::Error::other)?;
        let (publisher, news) = watch::channel(Arc::new(monitor.status()));
        let mut router = Router::new()
            .route("/", get(flow_page))
            .route("/events", get(events))
            .route("/grid.png", get(grid))
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .with_state(Sources {
                monitor: monitor.clone(),
                registry: Arc::new(registry),
                policy,
                news,
                pages: Arc::new(Semaphore::new(PAGES)),
            })
            .layer(from_fn(guarded));
        if address.ip().is_loopback() {
            router = router.layer(from_fn_with_state(address, only_local_names));
        }
        let (over, end) = oneshot::channel();
        let task = runtime.spawn(async move {
            // Ends when it is told to, or with the runtime; a connection that fails ends alone.
            let _never = axum::serve(listener, router)
                .with_graceful_shutdown(publish(monitor, publisher, end))
                .await;
        });
        Ok(Self {
            address,
            runtime: runtime.clone(),
            over: Some(over),
            task,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dropped, it is heard as well.
        drop(self.over.take());
        let farewell = async { tokio::time::timeout(FAREWELL, &mut self.task).await };
        let _in_time = self.runtime.block_on(farewell);
        self.task.abort();
    }
}

/// Has the newest state of the run at hand for all pages, until the end.
async fn publish(
    monitor: Monitor,
    news: watch::Sender<Arc<Status>>,
    mut end: oneshot::Receiver<()>,
) {
    while tokio::time::timeout(EVERY, &mut end).await.is_err() {
        news.send_replace(Arc::new(monitor.status()));
    }
    news.send_replace(Arc::new(monitor.status()));
}

/// Refuses who came by a name that could be anyone's: a page elsewhere whose name was made to lead to this machine (DNS rebinding)
/// would read what is served to this machine alone.
async fn only_local_names(
    State(address): State<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let host = request.headers().get(header::HOST);
    match host.is_none_or(|host| host.to_str().is_ok_and(is_local_name)) {
        true => next.run(request).await,
        false => {
            let text = format!("served on this machine only: ask for http://{address}/\n");
            (StatusCode::MISDIRECTED_REQUEST, text).into_response()
        }
    }
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

/// What holds for every answer: it is of now, is what it says it is, and is for no other site's pages.
async fn guarded(request: Request, next: Next) -> Response {
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

async fn flow_page(State(sources): State<Sources>) -> Response {
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    let headers = [
        (header::CONTENT_TYPE, html),
        (header::CONTENT_SECURITY_POLICY, sources.policy),
    ];
    (headers, page::HTML).into_response()
}

async fn grid(State(sources): State<Sources>) -> Response {
    // The path is the run's own: nothing of the request is in it.
    let path = sources.monitor.seen().grid.as_ref().map(|g| g.path.clone());
    let picture = match path {
        Some(path) => tokio::fs::read(path).await.ok(),
        None => None,
    };
    match picture {
        Some(png) => ([(header::CONTENT_TYPE, "image/png")], png).into_response(),
        None => (StatusCode::NOT_FOUND, "no grid was drawn yet\n").into_response(),
    }
}

async fn events(State(sources): State<Sources>) -> Response {
    match Arc::clone(&sources.pages).try_acquire_owned() {
        Ok(permit) => Sse::new(updates(sources, permit)).into_response(),
        Err(_full) => {
            let text = format!("{PAGES} pages look on already\n");
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

/// Where one page stands.
struct Reader {
    sources: Sources,
    /// What it has of the curves.
    mark: Mark,
    begun: bool,
    _permit: OwnedSemaphorePermit,
}

/// One page's events: all curves at first, what is new every second, and `end` when the run is over. The next one is only made when
/// the one before was taken.
fn updates(
    sources: Sources,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let reader = Reader {
        sources,
        mark: Mark::default(),
        begun: false,
        _permit: permit,
    };
    stream::unfold(Some(reader), |reader| async move {
        let mut reader = reader?;
        if reader.begun && reader.sources.news.changed().await.is_err() {
            // Browsers pass over events without data.
            return Some((Ok(Event::default().event("end").data("over")), None));
        }
        reader.begun = true;
        let status = Arc::clone(&reader.sources.news.borrow_and_update());
        let update = Update {
            status: &status,
            curves: reader.sources.monitor.curves(&mut reader.mark),
        };
        // Numbers and text: they can always be written.
        let json = serde_json::to_string(&update).unwrap_or_default();
        let event = Event::default().data(json);
        Some((Ok(event), Some(reader)))
    })
}

async fn metrics(State(sources): State<Sources>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &sources.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn healthz(State(sources): State<Sources>) -> (StatusCode, String) {
    match sources.monitor.stalled() {
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
    fn a_name_that_could_be_anyones_is_not_local() {
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
