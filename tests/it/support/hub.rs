//! A stand-in for the Hub on loopback: the routes that hf-hub uses, over a model's folder.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

/// The only commit there is.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The tag that names it, beside the branch `main`.
pub(crate) const TAG: &str = "v1.0";
/// Files of at least this size are stored elsewhere, as the Hub does: they are answered by a redirect.
const LARGE: usize = 100_000;

/// A request, as far as the tests ask for it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

/// How the Hub misbehaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manner {
    /// Who may see the model: with a token, this one.
    pub(crate) token: Option<String>,
    /// Shows the list of files to everyone all the same, as for a gated model.
    pub(crate) gated: bool,
    /// Ends the first answer with this file after half of it.
    pub(crate) cut: Option<String>,
    /// Sends half of this file and then nothing more, but keeps the connection.
    pub(crate) silent: Option<String>,
    /// Sends this file with another last byte.
    pub(crate) damaged: Option<String>,
}

#[derive(Debug)]
struct State {
    id: String,
    files: BTreeMap<String, Vec<u8>>,
    manner: Mutex<Manner>,
    requests: Mutex<Vec<Request>>,
}

/// The running server; it ends with the test's process.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    pub(crate) endpoint: String,
    state: Arc<State>,
}

impl Hub {
    /// Serves a folder as the model `id`, with files beside it that nobody needs.
    pub(crate) fn start(id: &str, folder: &Path, manner: Manner) -> Self {
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
            manner: Mutex::new(manner),
            requests: Mutex::default(),
        });
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                let state = Arc::clone(&served);
                // A client that goes away is no failure.
                std::thread::spawn(move || drop(state.answer(socket.unwrap())));
            }
        });
        Self { endpoint, state }
    }

    /// Behaves otherwise from now on.
    pub(crate) fn behave(&self, manner: Manner) {
        *self.state.manner.lock().unwrap() = manner;
    }

    /// What was asked since the last time this was called.
    pub(crate) fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    /// The files among what was asked, and which commit or branch they were asked of.
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

fn read(folder: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        match path.is_dir() {
            true => read(&path, &format!("{name}/"), files),
            false => drop(files.insert(name, std::fs::read(&path).unwrap())),
        }
    }
}

/// What to answer.
struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent.
    sent: usize,
    /// Keeps the connection for so long after that.
    then: Duration,
}

impl Answer {
    fn new(status: &'static str, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Self {
        Self {
            status,
            headers,
            sent: body.len(),
            then: Duration::ZERO,
            body,
        }
    }

    fn error(status: &'static str) -> Self {
        Self::new(status, Vec::new(), b"{\"error\": \"no\"}".to_vec())
    }
}

impl State {
    fn answer(&self, socket: TcpStream) -> std::io::Result<()> {
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
        let mut socket = socket;
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
        std::thread::sleep(answer.then);
        socket.shutdown(std::net::Shutdown::Write)?;
        // Closing with unread bytes would reset the connection.
        socket.read_to_end(&mut Vec::new()).map(drop)
    }

    fn decide(&self, request: &Request) -> Answer {
        let manner = self.manner.lock().unwrap().clone();
        let known = |revision: &str| ["main", TAG, COMMIT].contains(&revision);
        let wanted = manner.token.as_ref().map(|token| format!("Bearer {token}"));
        let allowed = wanted.is_none() || wanted == request.authorization;
        let refused = match request.authorization.is_some() {
            true => "403 Forbidden",
            false => "401 Unauthorized",
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
            return match known(revision) {
                _ if !allowed && !manner.gated => Answer::error(refused),
                true => Answer::new("200 OK", Vec::new(), body.to_string().into_bytes()),
                false => Answer::error("404 Not Found"),
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
                &manner,
                name,
                vec![commit, ("etag", sha[..41].to_owned() + "\"")],
            );
        }
        match request.path.strip_prefix("/store/") {
            Some(name) if self.files.contains_key(name) => {
                // hf-hub reads the commit and the ETag where a redirect within the host ends.
                let sha = format!("\"{:x}\"", Sha256::digest(&self.files[name]));
                let headers = vec![("x-repo-commit", COMMIT.to_owned()), ("etag", sha)];
                self.part(request, &manner, name, headers)
            }
            _ => Answer::error("404 Not Found"),
        }
    }

    /// The bytes of a file that were asked for.
    fn part(
        &self,
        request: &Request,
        manner: &Manner,
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
        // What is asked first is one byte, for its headers.
        let whole = end == total && total > 1;
        if whole && is(&manner.damaged) {
            bytes[total - 1] ^= 1;
        }
        headers.push((
            "content-range",
            format!("bytes {start}-{}/{total}", end - 1),
        ));
        let mut answer = Answer::new("206 Partial Content", headers, bytes[start..end].to_vec());
        if whole && is(&manner.cut) {
            self.manner.lock().unwrap().cut = None;
            answer.sent = answer.body.len() / 2;
        }
        if whole && is(&manner.silent) {
            answer.sent = answer.body.len() / 2;
            answer.then = Duration::from_secs(30);
        }
        answer
    }
}
