//! A real S3 server that outlives every trainer, behind a proxy that injects faults: a bucket `emoji` of shards and a bucket `out` to
//! write to.

use std::path::{Path, PathBuf};

use coffey_pipeline::{S3Options, Sources};
use tempfile::TempDir;
use tokio::runtime::Runtime;

#[path = "../../../pipeline/tests/it/support/proxy.rs"]
#[allow(dead_code, reason = "the pipeline's tests use the rest")]
pub(crate) mod proxy;
#[path = "../../../pipeline/tests/it/support/server.rs"]
mod server;

use proxy::{Proxy, Rule};

/// The running server, which takes requests signed with the key that [`super::command`] sets.
pub(crate) struct Cloud {
    pub(crate) proxy: Proxy,
    pub(crate) root: TempDir,
    /// The quickstart's configuration with this server as its S3 endpoint.
    pub(crate) config: PathBuf,
    runtime: Runtime,
}

impl Cloud {
    pub(crate) fn start(rule: Rule) -> Self {
        let root = tempfile::tempdir().unwrap();
        let served = root.path().join("served");
        super::copy(
            &super::repository("assets/quickstart/emoji"),
            &served.join("emoji"),
        );
        std::fs::create_dir(served.join("out")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let upstream = server::serve(runtime.handle(), &served, &["test"]);
        let proxy = Proxy::start(runtime.handle(), upstream, rule);
        let config = root.path().join("cloud.toml");
        write_config(&config, &proxy.endpoint, 4);
        Self {
            proxy,
            root,
            config,
            runtime,
        }
    }

    /// The folder of the bucket `out`.
    pub(crate) fn out(&self) -> PathBuf {
        self.root.path().join("served/out")
    }

    /// Writes an object of the bucket `out`, as another client does.
    pub(crate) fn put(&self, name: &str, content: &[u8]) {
        let client = Sources::new(S3Options {
            embedded_root: Some(self.root.path().join("served")),
            ..S3Options::default()
        });
        let client = self.runtime.block_on(client).unwrap();
        let bucket = client.destination("s3://out/", self.runtime.handle());
        bucket.unwrap().write(name, content).unwrap();
    }

    /// The number of uploads that are neither completed nor aborted.
    pub(crate) fn uploads(&self) -> usize {
        let entries = std::fs::read_dir(self.root.path().join("served")).unwrap();
        entries
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_string_lossy().starts_with(".upload-")
            })
            .count()
    }
}

/// Writes the quickstart's configuration with `endpoint` instead of the embedded S3 server.
pub(crate) fn write_config(path: &Path, endpoint: &str, max_attempts: u32) {
    let text = std::fs::read_to_string(super::repository(super::QUICKSTART)).unwrap();
    // The embedded server's key becomes a comment.
    let keys = format!(
        "endpoint_url = \"{endpoint}\"\npath_style = true\nmax_attempts = {max_attempts}\nregion = \"us-east-1\" # "
    );
    std::fs::write(path, text.replace("embedded_root = ", &keys)).unwrap();
}
