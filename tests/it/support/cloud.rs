//! A bucket `out` to write to and a bucket `emoji` of shards, on a real S3 server that outlives every trainer, behind a proxy
//! that makes faults.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::runtime::Runtime;

#[path = "../../../pipeline/tests/it/support/proxy.rs"]
#[allow(dead_code, reason = "the pipeline's tests use the rest")]
pub(crate) mod proxy;
#[path = "../../../pipeline/tests/it/support/server.rs"]
mod server;

use proxy::{Proxy, Rule};

/// The running server. It asks for requests signed with the key that [`super::command`] sets.
pub(crate) struct Cloud {
    pub(crate) proxy: Proxy,
    pub(crate) root: TempDir,
    /// A configuration for the quickstart that reads and writes there.
    pub(crate) config: PathBuf,
    _runtime: Runtime,
}

impl Cloud {
    pub(crate) fn start(rule: Rule) -> Self {
        let root = tempfile::tempdir().unwrap();
        let served = root.path().join("served");
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/quickstart");
        super::copy(&assets.join("emoji"), &served.join("emoji"));
        std::fs::create_dir(served.join("out")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let upstream = server::serve(runtime.handle(), &served, &["test"]);
        let proxy = Proxy::start(runtime.handle(), upstream, rule);
        let config = root.path().join("cloud.toml");
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml");
        let text = std::fs::read_to_string(text).unwrap();
        let place = format!(
            "endpoint_url = \"{}\"\npath_style = true\nmax_attempts = 4\nregion = \"us-east-1\" #",
            proxy.endpoint
        );
        std::fs::write(
            &config,
            text.replace("embedded_root = ", &format!("{place} ")),
        )
        .unwrap();
        Self {
            proxy,
            root,
            config,
            _runtime: runtime,
        }
    }

    /// What is under `out/`, as files.
    pub(crate) fn out(&self) -> PathBuf {
        self.root.path().join("served/out")
    }

    /// Uploads in parts that are neither completed nor aborted.
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
