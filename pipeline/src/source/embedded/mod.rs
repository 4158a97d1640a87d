//! An S3 server inside the process, on loopback: for the quickstart and for tests.
//!
//! It serves the subfolders of a folder as buckets, and writes nothing for requests that only read.
//! The pipeline reaches it like any other S3 server.

mod files;

use std::path::Path;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::net::SourceError;
use crate::open_files;
use files::ServedFiles;

/// The running server. Dropping it ends the server and its connections.
#[derive(Debug)]
pub(crate) struct EmbeddedS3 {
    endpoint: String,
    server: JoinHandle<()>,
}

impl EmbeddedS3 {
    /// Serves `root` on a free port of 127.0.0.1. Needs a running tokio runtime.
    pub(crate) async fn start(root: &Path) -> Result<Self, SourceError> {
        let failed = |cause: String| SourceError::Embedded {
            root: root.to_owned(),
            cause,
        };
        if !root.is_dir() {
            return Err(failed(
                "is not a folder; its subfolders are served as buckets".to_owned(),
            ));
        }
        let files = s3s_fs::FileSystem::new(root)
            .map_err(|error| failed(format!("can't be served: {error:?}")))?;
        let mut service = S3ServiceBuilder::new(ServedFiles(files));
        service.set_auth(SimpleAuth::from_single("embedded", "embedded"));
        let service = service.build();
        let bound = async {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
            let address = listener.local_addr()?;
            Ok::<_, std::io::Error>((listener, address))
        };
        let (listener, address) = bound
            .await
            .map_err(|error| failed(format!("no port to serve it on: {error}")))?;
        let server = tokio::spawn(async move {
            // Dropped with this task, which ends the connections.
            let mut connections = JoinSet::new();
            loop {
                let socket = open_files::accept(&listener).await;
                while connections.try_join_next().is_some() {}
                let service = service.clone();
                connections.spawn(async move {
                    let http = Builder::new(TokioExecutor::new());
                    if let Err(error) = http.serve_connection(TokioIo::new(socket), service).await {
                        tracing::debug!(error, "a connection to the embedded S3 server ended");
                    }
                });
            }
        });
        Ok(Self {
            endpoint: format!("http://{address}"),
            server,
        })
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for EmbeddedS3 {
    fn drop(&mut self) {
        self.server.abort();
    }
}
