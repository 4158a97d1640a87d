//! A fake Hugging Face Hub on loopback that takes pushes: repositories, commits, and Git LFS's batch interface with a store on another
//! port. It serves the pushed files to the Hub's Python client.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The token that may write.
pub(crate) const TOKEN: &str = "hf_not_to_be_seen";
/// The commit that every answer names.
const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
/// The query of a signed URL.
const SIGNATURE: &str = "signature=not-to-be-seen-either";

/// Wrong answers to requests whose method and path contain `on`.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) on: &'static str,
    /// The status; with 0, the request is carried out and the connection closed without an answer.
    pub(crate) status: u16,
    pub(crate) times: usize,
}

/// A received request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) to_storage: bool,
    pub(crate) authorization: Option<String>,
    length: Option<usize>,
    body: Vec<u8>,
}

#[derive(Debug, Default)]
struct Held {
    /// The repository's files; `None` before it is created.
    files: Option<BTreeMap<String, Vec<u8>>>,
    /// Large files by SHA-256, with or without a commit that names them.
    stored: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<(String, usize), Vec<u8>>,
    commits: usize,
    faults: Vec<Fault>,
    requests: Vec<Request>,
}

#[derive(Debug)]
struct State {
    id: String,
    endpoint: String,
    storage: String,
    chunk: usize,
    held: Mutex<Held>,
}

/// The running servers, which end with the test's process.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    pub(crate) endpoint: String,
    state: Arc<State>,
}

impl Receiver {
    /// Starts without the repository `id`. Files of more than `chunk` bytes are taken in parts.
    pub(crate) fn start(id: &str, chunk: usize) -> Self {
        let listen = || TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = |l: &TcpListener| format!("http://{}", l.local_addr().unwrap());
        let (hub, storage) = (listen(), listen());
        let state = Arc::new(State {
            id: id.to_owned(),
            endpoint: address(&hub),
            storage: address(&storage),
            chunk,
            held: Mutex::default(),
        });
        for (listener, to_storage) in [(hub, false), (storage, true)] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for socket in listener.incoming() {
                    let state = Arc::clone(&state);
                    // A client may close the connection at any time.
                    std::thread::spawn(move || state.serve(socket.unwrap(), to_storage).ok());
                }
            });
        }
        Self {
            endpoint: state.endpoint.clone(),
            state,
        }
    }

    pub(crate) fn fail(&self, on: &'static str, status: u16, times: usize) {
        let fault = Fault { on, status, times };
        self.state.held.lock().unwrap().faults.push(fault);
    }

    /// Removes all faults.
    pub(crate) fn behave(&self) {
        self.state.held.lock().unwrap().faults.clear();
    }

    /// Takes the requests since the last call.
    pub(crate) fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.held.lock().unwrap().requests)
    }

    pub(crate) fn files(&self) -> Option<BTreeMap<String, Vec<u8>>> {
        self.state.held.lock().unwrap().files.clone()
    }

    pub(crate) fn commits(&self) -> usize {
        self.state.held.lock().unwrap().commits
    }

    /// Changes a file as an edit on the website does.
    pub(crate) fn edit(&self, name: &str, content: &[u8]) {
        let mut held = self.state.held.lock().unwrap();
        let files = held.files.as_mut().unwrap();
        files.insert(name.to_owned(), content.to_vec());
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn json(value: &Value) -> Self {
        Self {
            status: 200,
            headers: vec![("content-type", "application/json".to_owned())],
            body: value.to_string().into_bytes(),
        }
    }

    fn error(status: u16, message: &str) -> Self {
        Self {
            status,
            ..Self::json(&json!({"error": message}))
        }
    }
}

impl State {
    fn serve(&self, mut socket: TcpStream, to_storage: bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(socket.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut request = Request {
            line: line.trim().trim_end_matches(" HTTP/1.1").to_owned(),
            to_storage,
            authorization: None,
            length: None,
            body: Vec::new(),
        };
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim().split_once(": ") else {
                break;
            };
            match name.to_ascii_lowercase().as_str() {
                "authorization" => request.authorization = Some(value.to_owned()),
                "content-length" => request.length = Some(value.parse().unwrap()),
                _ => {}
            }
        }
        request.body = vec![0; request.length.unwrap_or(0)];
        reader.read_exact(&mut request.body)?;
        let Some(answer) = self.answer(&request) else {
            return Ok(());
        };
        write!(
            socket,
            "HTTP/1.1 {} Status\r\nconnection: close\r\n",
            answer.status
        )?;
        for (name, value) in &answer.headers {
            write!(socket, "{name}: {value}\r\n")?;
        }
        write!(socket, "content-length: {}\r\n\r\n", answer.body.len())?;
        if !request.line.starts_with("HEAD ") {
            socket.write_all(&answer.body)?;
        }
        socket.flush()?;
        socket.shutdown(std::net::Shutdown::Write)?;
        socket.read_to_end(&mut Vec::new())?;
        Ok(())
    }

    fn answer(&self, request: &Request) -> Option<Answer> {
        let mut held = self.held.lock().unwrap();
        held.requests.push(Request {
            body: Vec::new(),
            ..request.clone()
        });
        let fault = held
            .faults
            .iter_mut()
            .find(|fault| fault.times > 0 && request.line.contains(fault.on));
        let status = fault.map(|fault| {
            fault.times -= 1;
            fault.status
        });
        match status {
            None => Some(self.decide(&mut held, request)),
            Some(0) => {
                self.decide(&mut held, request);
                None
            }
            // The answer repeats the request's token, which the client must not print.
            Some(status) => {
                let sent = request.authorization.as_deref().unwrap_or("nothing");
                Some(Answer::error(status, &format!("not now, you with {sent}")))
            }
        }
    }

    fn decide(&self, held: &mut Held, request: &Request) -> Answer {
        let (method, path) = request.line.split_once(' ').unwrap();
        if request.to_storage {
            return store(held, request, path);
        }
        let body = || serde_json::from_slice::<Value>(&request.body).unwrap();
        let api = path.strip_prefix(&format!("/api/models/{}", self.id));
        if method != "POST" && !path.starts_with("/api/whoami") {
            return self.serve_file(held, path);
        }
        if let Some(oid) = path.strip_prefix("/complete/") {
            return complete(held, oid, &body());
        }
        if request.authorization != Some(format!("Bearer {TOKEN}")) {
            return Answer::error(401, "Invalid username or password.");
        }
        let verify = format!("/{}/verify", self.id);
        let batch = format!("/{}.git/info/lfs/objects/batch", self.id);
        match (path, api) {
            ("/api/whoami-v2", _) => Answer::json(&json!({"name": "someone"})),
            ("/api/repos/create", _) => match held.files {
                Some(_) => Answer::error(409, "You already created this model repo"),
                None => {
                    let (user, name) = self.id.split_once('/').unwrap();
                    assert_eq!(
                        body(),
                        json!({"name": name, "organization": user, "type": "model"})
                    );
                    held.files = Some(BTreeMap::new());
                    Answer::json(&json!({"url": format!("{}/{}", self.endpoint, self.id)}))
                }
            },
            (_, Some("/preupload/main")) => modes(held, &body()),
            (_, Some("/commit/main")) => self.commit(held, &request.body),
            (path, _) if path == batch => Answer::json(&self.batch(held, &body())),
            (path, _) if path == verify => {
                let object = body();
                let stored = held.stored.get(object["oid"].as_str().unwrap());
                if stored.is_some_and(|bytes| json!(bytes.len()) == object["size"]) {
                    Answer::json(&json!({}))
                } else {
                    Answer::error(422, "not stored")
                }
            }
            _ => Answer::error(404, "Sorry, we can't find the page you are looking for."),
        }
    }

    fn batch(&self, held: &Held, question: &Value) -> Value {
        let object = |object: &Value| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64());
            if held.stored.contains_key(oid) {
                return json!({"oid": oid, "size": size});
            }
            let size = size.unwrap() as usize;
            let verify = json!({"href": format!("{}/{}/verify", self.endpoint, self.id)});
            let put = format!("{}/put/{oid}", self.storage);
            let upload = if size > self.chunk {
                let mut header = json!({"chunk_size": self.chunk.to_string()});
                for part in 1..=size.div_ceil(self.chunk) {
                    header[part.to_string()] = json!(format!("{put}/{part}?{SIGNATURE}"));
                }
                json!({"href": format!("{}/complete/{oid}", self.endpoint), "header": header})
            } else {
                json!({"href": format!("{put}?{SIGNATURE}"), "header": {"x-kind": "weights"}})
            };
            json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        };
        assert_eq!(question["operation"], "upload");
        let objects = question["objects"].as_array().unwrap().iter();
        json!({"transfer": "basic", "objects": objects.map(object).collect::<Vec<_>>()})
    }

    fn commit(&self, held: &mut Held, lines: &[u8]) -> Answer {
        let lines: Vec<Value> = String::from_utf8_lossy(lines)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["key"], "header");
        assert!(!lines[0]["value"]["summary"].as_str().unwrap().is_empty());
        let mut files = held.files.clone().unwrap();
        for line in &lines[1..] {
            let value = &line["value"];
            let content = match line["key"].as_str().unwrap() {
                "lfsFile" => match held.stored.get(value["oid"].as_str().unwrap()) {
                    Some(content) => content.clone(),
                    None => return Answer::error(400, "a large file is not stored"),
                },
                "file" => BASE64_STANDARD
                    .decode(value["content"].as_str().unwrap())
                    .unwrap(),
                other => panic!("{other}"),
            };
            files.insert(value["path"].as_str().unwrap().to_owned(), content);
        }
        held.files = Some(files);
        held.commits += 1;
        let url = format!("{}/{}/commit/{COMMIT}", self.endpoint, self.id);
        Answer::json(&json!({"commitUrl": url, "commitOid": COMMIT}))
    }

    /// Serves metadata and files to the Hub's client.
    fn serve_file(&self, held: &Held, path: &str) -> Answer {
        let none = BTreeMap::new();
        let files = held.files.as_ref().unwrap_or(&none);
        let path = path.split('?').next().unwrap();
        if path.starts_with(&format!("/api/models/{}/tree/", self.id)) {
            let file = |(name, content): (&String, &Vec<u8>)| {
                let oid = format!("{:x}", Sha1::digest(content));
                json!({"type": "file", "path": name, "size": content.len(), "oid": oid})
            };
            return Answer::json(&files.iter().map(file).collect());
        }
        if path.starts_with(&format!("/api/models/{}", self.id)) {
            let siblings: Vec<_> = files
                .keys()
                .map(|name| json!({"rfilename": name}))
                .collect();
            return Answer::json(&json!({"id": self.id, "sha": COMMIT, "siblings": siblings}));
        }
        let resolved = path.strip_prefix(&format!("/{}/resolve/", self.id));
        let name = resolved.and_then(|path| path.split_once('/'));
        match name.and_then(|(_, name)| files.get(name)) {
            None => {
                let mut answer = Answer::error(404, "Entry not found");
                answer
                    .headers
                    .push(("x-error-code", "EntryNotFound".to_owned()));
                answer.headers.push(("x-repo-commit", COMMIT.to_owned()));
                answer
            }
            Some(content) => Answer {
                status: 200,
                headers: vec![
                    ("x-repo-commit", COMMIT.to_owned()),
                    ("etag", format!("\"{:x}\"", Sha256::digest(content))),
                ],
                body: content.clone(),
            },
        }
    }
}

/// The upload mode of each file: large files for everything that is not text.
fn modes(held: &Held, question: &Value) -> Answer {
    let Some(files) = &held.files else {
        return Answer::error(404, "Repository not found");
    };
    let mode = |file: &Value| {
        let name = file["path"].as_str().unwrap();
        let sample = BASE64_STANDARD.decode(file["sample"].as_str().unwrap());
        let text = String::from_utf8(sample.unwrap()).is_ok_and(|sample| !sample.contains('\0'));
        let oid = files.get(name).map(|content| {
            if text {
                let blob = Sha1::new().chain_update(format!("blob {}\0", content.len()));
                format!("{:x}", blob.chain_update(content).finalize())
            } else {
                format!("{:x}", Sha256::digest(content))
            }
        });
        let mode = if text { "regular" } else { "lfs" };
        json!({"path": name, "uploadMode": mode, "shouldIgnore": false, "oid": oid})
    };
    let files = question["files"].as_array().unwrap().iter();
    Answer::json(&json!({"files": files.map(mode).collect::<Vec<_>>()}))
}

/// Stores a whole file or a part of one.
fn store(held: &mut Held, request: &Request, path: &str) -> Answer {
    let Some(path) = path.strip_suffix(&format!("?{SIGNATURE}")) else {
        return Answer::error(403, "not signed");
    };
    if request.length.is_none() {
        return Answer::error(
            501,
            "A header you provided implies functionality that is not implemented",
        );
    }
    let path = path.strip_prefix("/put/").unwrap();
    let content = request.body.clone();
    let etag = format!("\"{:x}\"", Sha256::digest(&content));
    match path.split_once('/') {
        Some((oid, part)) => {
            let part = part.parse().unwrap();
            held.parts.insert((oid.to_owned(), part), content);
        }
        None if format!("{:x}", Sha256::digest(&content)) == path => {
            held.stored.insert(path.to_owned(), content);
        }
        None => return Answer::error(400, "the content has another SHA-256"),
    }
    Answer {
        status: 200,
        headers: vec![("etag", etag)],
        body: Vec::new(),
    }
}

fn complete(held: &mut Held, oid: &str, body: &Value) -> Answer {
    let mut whole = Vec::new();
    for (index, part) in body["parts"].as_array().unwrap().iter().enumerate() {
        assert_eq!(part["partNumber"], index + 1);
        let content = &held.parts[&(oid.to_owned(), index + 1)];
        assert_eq!(part["etag"], format!("\"{:x}\"", Sha256::digest(content)));
        whole.extend(content);
    }
    assert_eq!(format!("{:x}", Sha256::digest(&whole)), oid);
    held.stored.insert(oid.to_owned(), whole);
    Answer::json(&json!({}))
}
