//! A real S3 server over a folder, apart from the one inside the product: with keys of its own, or
//! open to everybody.

use std::net::SocketAddr;
use std::path::Path;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// Serves `root`'s subfolders as buckets for as long as `runtime` runs. Requests have to be signed
/// with one of `keys` (each is its own secret), or to be unsigned if there are none.
pub fn serve(runtime: &Handle, root: &Path, keys: &[&str]) -> SocketAddr {
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    if !keys.is_empty() {
        let mut auth = SimpleAuth::new();
        for key in keys {
            auth.register((*key).to_owned(), (*key).into());
        }
        service.set_auth(auth);
    }
    let service = service.build();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((socket, _)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            let service = service.clone();
            connections.spawn(async move {
                let http = Builder::new(TokioExecutor::new());
                let _gone = http.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    address
}
