//! The HTTP side: `/metrics` and `/healthz`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::{Monitor, Stalled};

/// What Prometheus asks for by this name.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Sources {
    monitor: Monitor,
    registry: Arc<Registry>,
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
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .with_state(Sources {
                monitor,
                registry: Arc::new(registry),
            });
        let task = runtime.spawn(async move {
            // Ends with the runtime or when it is aborted; a connection that fails ends alone.
            let _never = axum::serve(listener, router).await;
        });
        Ok(Self { address, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
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
