//! A fake Hugging Face Hub on loopback that serves a model's folder by the routes that hf-hub uses.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// The only commit.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// A tag of the commit, beside the branch `main`.
pub(crate) const TAG: &str = "v1.0";
/// Files of at least this size are answered by a redirect to the store, as by the Hub. Bytes.
const LARGE: usize = 100_000;

/// The parts of a request that tests look at.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

/// Faults and access rules of the fake Hub.
#[derive(Clone, Debug, Default)]
pub(crate) struct Behavior {
    /// The token that may see the model; `None` makes it public.
    pub(crate) token: Option<String>,
    /// Whether the list of files is public all the same, as for a gated model.
    pub(crate) gated: bool,
    /// The file whose first answer ends after half of it.
    pub(crate) cut: Option<String>,
    /// The file of which half is sent and then nothing, on an open connection.
    pub(crate) silent: Option<String>,
    /// The file that is sent with a wrong last byte.
    pub(crate) damaged: Option<String>,
}

#[derive(Debug)]
struct State {
    id: String,
    files: BTreeMap<String, Vec<u8>>,
    behavior: Mutex<Behavior>,
    requests: Mutex<Vec<Request>>,
}

/// The running server, which ends with the test's process.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    pub(crate) endpoint: String,
    state: Arc<State>,
}

impl Hub {
    /// Serves a folder as the model `id`, with more files that must not be fetched.
    pub(crate) fn start(id: &str, folder: &Path, behavior: Behavior) -> Self {
        let mut files = BTreeMap::new();
        read(folder, "", &mut files);
        for name in [
            "README.md",
            "model.ckpt",
            "model-pruned.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_flax_model.msgpack",
            "safety_checker/model.safetensors",
        ] {
            files.insert(name.to_owned(), b"not to be fetched".to_vec());
        }
        let state = Arc::new(State {
            id: id.to_owned(),
            files,
            behavior: Mutex::new(behavior),
            requests: Mutex::default(),
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let state = Arc::clone(&served);
                // A client may close the connection at any time.
                std::thread::spawn(move || state.answer(socket.unwrap()).ok());
            }
        });
        Self { endpoint, state }
    }

    /// Sets the behavior from the next request on.
    pub(crate) fn behave(&self, behavior: Behavior) {
        *self.state.behavior.lock().unwrap() = behavior;
    }

    /// Takes the requests since the last call.
    pub(crate) fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    /// Takes the requests since the last call; returns the requested files, each with its commit or branch.
    pub(crate) fn asked_files(&self) -> BTreeSet<(String, String)> {
        let prefix = format!("/{}/resolve/", self.state.id);
        let requests = self.asked();
        let files = requests.iter().filter_map(|request| {
            let (revision, file) = request.path.strip_prefix(&prefix)?.split_once('/')?;
            Some((file.to_owned(), revision.to_owned()))
        });
        files.collect()
    }
}

/// A user of the Hub: a folder for caches and runs, and the Hub's endpoint.
pub(crate) struct User {
    pub(crate) folder: TempDir,
    endpoint: String,
}

impl User {
    pub(crate) fn new(endpoint: &str) -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            endpoint: endpoint.to_owned(),
        }
    }

    /// A path in the user's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command in the user's environment, without a token.
    pub(crate) fn command(&self, args: &[impl AsRef<std::ffi::OsStr>]) -> Command {
        let mut command = super::command(args);
        for name in [
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "HF_HUB_DOWNLOAD_TIMEOUT",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", self.path("hf"))
            .env("XDG_CACHE_HOME", self.path("cache"));
        command
    }
}

fn read(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            read(&path, &format!("{name}/"), files);
        } else {
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
}

/// An answer to a request.
struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The number of bytes of the body that are sent.
    sent: usize,
    /// The time for which the connection stays open after that.
    keep_open: Duration,
}

impl Answer {
    fn new(status: &'static str, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Self {
        Self {
            status,
            headers,
            sent: body.len(),
            keep_open: Duration::ZERO,
            body,
        }
    }

    fn error(status: &'static str) -> Self {
        Self::new(status, Vec::new(), b"{\"error\": \"no\"}".to_vec())
    }
}

impl State {
    fn answer(&self, mut socket: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(socket.try_clone()?).lines();
        let first = lines.next().unwrap_or(Ok(String::new()))?;
        let mut request = Request {
            path: first.split(' ').nth(1).unwrap_or_default().to_owned(),
            range: None,
            authorization: None,
        };
        for line in lines {
            let line = line?;
            match line.split_once(": ") {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                    request.range = Some(value.to_owned());
                }
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    request.authorization = Some(value.to_owned());
                }
                Some(_) => {}
            }
        }
        self.requests.lock().unwrap().push(request.clone());
        let answer = self.decide(&request);
        write!(
            socket,
            "HTTP/1.1 {}\r\nconnection: close\r\n",
            answer.status
        )?;
        for (name, value) in &answer.headers {
            write!(socket, "{name}: {value}\r\n")?;
        }
        write!(socket, "content-length: {}\r\n\r\n", answer.body.len())?;
        socket.write_all(&answer.body[..answer.sent])?;
        socket.flush()?;
        std::thread::sleep(answer.keep_open);
        socket.shutdown(std::net::Shutdown::Write)?;
        // Closing with unread bytes would reset the connection.
        socket.read_to_end(&mut Vec::new())?;
        Ok(())
    }

    fn decide(&self, request: &Request) -> Answer {
        let behavior = self.behavior.lock().unwrap().clone();
        let known = |revision: &str| ["main", TAG, COMMIT].contains(&revision);
        let wanted = behavior
            .token
            .as_ref()
            .map(|token| format!("Bearer {token}"));
        let allowed = wanted.is_none() || wanted == request.authorization;
        let refused = if request.authorization.is_some() {
            "403 Forbidden"
        } else {
            "401 Unauthorized"
        };
        if let Some(revision) = request
            .path
            .strip_prefix(&format!("/api/models/{}/revision/", self.id))
        {
            let names: Vec<_> = self.files.keys().collect();
            let siblings: Vec<_> = names
                .iter()
                .map(|name| json!({"rfilename": name}))
                .collect();
            let body = json!({"id": self.id, "sha": COMMIT, "siblings": siblings});
            return if !allowed && !behavior.gated {
                Answer::error(refused)
            } else if known(revision) {
                Answer::new("200 OK", Vec::new(), body.to_string().into_bytes())
            } else {
                Answer::error("404 Not Found")
            };
        }
        let resolved = request.path.strip_prefix(&format!("/{}/resolve/", self.id));
        if let Some((revision, name)) = resolved.and_then(|path| path.split_once('/')) {
            let (Some(bytes), true) = (self.files.get(name), known(revision)) else {
                return Answer::error("404 Not Found");
            };
            if !allowed {
                return Answer::error(refused);
            }
            let commit = ("x-repo-commit", COMMIT.to_owned());
            let sha = format!("\"{:x}\"", Sha256::digest(bytes));
            if bytes.len() >= LARGE {
                let headers = vec![
                    commit,
                    ("x-linked-etag", sha),
                    ("x-linked-size", bytes.len().to_string()),
                    ("etag", "\"of the redirect\"".to_owned()),
                    ("location", format!("/store/{name}")),
                ];
                return Answer::new("302 Found", headers, Vec::new());
            }
            return self.part(
                request,
                &behavior,
                name,
                vec![commit, ("etag", sha[..41].to_owned() + "\"")],
            );
        }
        match request.path.strip_prefix("/store/") {
            Some(name) if self.files.contains_key(name) => {
                // hf-hub reads the commit and the ETag at the end of a redirect within the host.
                let sha = format!("\"{:x}\"", Sha256::digest(&self.files[name]));
                let headers = vec![("x-repo-commit", COMMIT.to_owned()), ("etag", sha)];
                self.part(request, &behavior, name, headers)
            }
            _ => Answer::error("404 Not Found"),
        }
    }

    /// The requested range of a file.
    fn part(
        &self,
        request: &Request,
        behavior: &Behavior,
        name: &str,
        mut headers: Vec<(&'static str, String)>,
    ) -> Answer {
        let is = |file: &Option<String>| file.as_deref() == Some(name);
        let mut bytes = self.files[name].clone();
        let total = bytes.len();
        let range = request.range.as_deref().unwrap_or("bytes=0-");
        let (start, end) = range
            .strip_prefix("bytes=")
            .unwrap()
            .split_once('-')
            .unwrap();
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(total, |end: usize| end + 1).min(total);
        if start >= total {
            return Answer::error("416 Range Not Satisfiable");
        }
        // hf-hub first requests one byte for its headers.
        let whole = end == total && total > 1;
        if whole && is(&behavior.damaged) {
            bytes[total - 1] ^= 1;
        }
        headers.push((
            "content-range",
            format!("bytes {start}-{}/{total}", end - 1),
        ));
        let mut answer = Answer::new("206 Partial Content", headers, bytes[start..end].to_vec());
        if whole && is(&behavior.cut) {
            self.behavior.lock().unwrap().cut = None;
            answer.sent = answer.body.len() / 2;
        }
        if whole && is(&behavior.silent) {
            answer.sent = answer.body.len() / 2;
            answer.keep_open = Duration::from_secs(30);
        }
        answer
    }
}
