//! Requests to the Hub and to the storage it names: retried where a failure may pass, ended by silence and by a stop.

use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::DecimalBytes;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::SendBody;
use ureq::http::{Request, Response};

use super::{HubError, Settings, io};
use tokio_util::sync::CancellationToken;

/// Tries of one request before it is given up.
pub(super) const MAX_ATTEMPTS: u32 = 5;
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// However long the Hub asks to be left alone.
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// The largest answer that is read; a list of addresses for the parts of large files. Bytes.
const MAX_ANSWER: u64 = 64 << 20;
/// How much of a server's words is repeated. Characters.
const MAX_SAID: usize = 300;
/// Time between two lines about the same file.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Type of Git LFS's messages.
pub(super) const LFS: &str = "application/vnd.git-lfs+json";

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Body<'a> {
    Nothing,
    /// A text and its type.
    Text(&'a str, &'static str),
    /// A part of a file: where it begins, and its length.
    Part(&'a Path, u64, u64),
}

/// A request.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// What is asked for, as in "can't …".
    pub(super) what: String,
    pub(super) method: &'static str,
    pub(super) url: &'a str,
    /// Headers besides those every request has.
    pub(super) headers: Vec<(&'a str, &'a str)>,
    pub(super) body: Body<'a>,
    /// Answers that are no failures, besides 2xx.
    pub(super) expects: &'static [u16],
}

/// An answer that is no failure.
#[derive(Debug)]
pub(super) struct Answer {
    what: String,
    pub(super) status: u16,
    pub(super) etag: Option<String>,
    text: String,
}

impl Answer {
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, HubError> {
        serde_json::from_str(&self.text).map_err(|error| HubError::Answer {
            what: self.what.clone(),
            cause: error.to_string(),
        })
    }
}

/// How a request failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// Repeating won't help.
    Final(HubError),
    /// It may pass, after the time that the server asks for.
    Passing(String, Option<Duration>),
}

/// Waits between attempts, each longer than the one before.
#[derive(Debug)]
pub(super) struct Attempts {
    made: u32,
    delay: Duration,
}

impl Attempts {
    pub(super) fn new() -> Self {
        Self {
            made: 0,
            delay: FIRST_DELAY,
        }
    }

    /// Waits before the next attempt; an error if there is none.
    pub(super) fn next(
        &mut self,
        fault: Fault,
        what: &str,
        stop: &CancellationToken,
    ) -> Result<(), HubError> {
        self.made += 1;
        let (cause, asked) = match fault {
            Fault::Final(error) => return Err(error),
            Fault::Passing(cause, asked) => (cause, asked),
        };
        if self.made >= MAX_ATTEMPTS {
            return Err(HubError::Unreachable {
                what: what.to_owned(),
                attempts: self.made,
                cause,
            });
        }
        let until = Instant::now() + asked.unwrap_or(self.delay).min(LONGEST_DELAY);
        self.delay *= 2;
        while Instant::now() < until {
            if stop.is_cancelled() {
                return Err(HubError::Stopped);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Makes requests about one repository.
#[derive(Debug)]
pub(super) struct Client<'a> {
    pub(super) settings: &'a Settings,
    pub(super) id: &'a str,
    pub(super) stop: &'a CancellationToken,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a Settings, id: &'a str, stop: &'a CancellationToken) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // A body can't be sent twice, and a token must not follow.
            .max_redirects(0)
            .timeout_connect(Some(settings.silence))
            .timeout_per_read(Some(settings.silence))
            .timeout_per_write(Some(settings.silence))
            .user_agent(concat!("coffey/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self {
            settings,
            id,
            stop,
            agent,
        }
    }

    /// An address of the Hub.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.settings.endpoint)
    }

    /// Whether an address is the Hub's own, which the token may go to.
    fn is_own(&self, url: &str) -> bool {
        url.strip_prefix(&self.settings.endpoint)
            .is_some_and(|rest| rest.starts_with('/'))
    }

    /// Makes a request until it works or the attempts are spent.
    pub(super) fn call(&self, call: &Call<'_>) -> Result<Answer, HubError> {
        let mut attempts = Attempts::new();
        loop {
            match self.once(call) {
                Ok(answer) => return Ok(answer),
                Err(fault) => attempts.next(fault, &call.what, self.stop)?,
            }
        }
    }

    /// Makes a request.
    pub(super) fn once(&self, call: &Call<'_>) -> Result<Answer, Fault> {
        if self.stop.is_cancelled() {
            return Err(Fault::Final(HubError::Stopped));
        }
        let own = self.is_own(call.url);
        let mut response = self.send(call, own)?;
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let (etag, wait) = (header("etag"), header("retry-after"));
        let said = header("x-error-message");
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(MAX_ANSWER);
        let text = body.read_to_string();
        if (200..300).contains(&status) || call.expects.contains(&status) {
            let text = text.map_err(|error| Fault::Passing(error.to_string(), None))?;
            return Ok(Answer {
                what: call.what.clone(),
                status,
                etag,
                text,
            });
        }
        let said = self.said(said, &text.unwrap_or_default());
        Err(match status {
            401 if own => Fault::Final(HubError::WrongToken {
                endpoint: self.settings.endpoint.clone(),
            }),
            403 if own => Fault::Final(HubError::Forbidden {
                endpoint: self.settings.endpoint.clone(),
                id: self.id.to_owned(),
                what: call.what.clone(),
                said,
            }),
            301 | 302 | 307 | 308 if own => Fault::Final(HubError::Moved {
                what: call.what.clone(),
                id: self.id.to_owned(),
            }),
            408 | 429 | 500 | 502 | 503 | 504 => {
                let wait = wait.and_then(|seconds| seconds.parse().ok());
                Fault::Passing(
                    format!("HTTP {status}{said}"),
                    wait.map(Duration::from_secs),
                )
            }
            status => Fault::Final(HubError::Refused {
                what: call.what.clone(),
                status,
                said,
            }),
        })
    }

    fn send(&self, call: &Call<'_>, own: bool) -> Result<Response<ureq::Body>, Fault> {
        let mut request = Request::builder().method(call.method).uri(call.url);
        if let (true, Some(token)) = (own, &self.settings.token) {
            request = request.header("authorization", format!("Bearer {}", token.secret()));
        }
        for (name, value) in &call.headers {
            request = request.header(*name, *value);
        }
        let sent = match call.body {
            Body::Nothing => {
                let request = request.body(()).map_err(|_| self.unusable(call))?;
                self.agent.run(request)
            }
            Body::Text(text, kind) => {
                let request = request.header("content-type", kind).body(text);
                self.agent.run(request.map_err(|_| self.unusable(call))?)
            }
            Body::Part(path, from, length) => {
                let opened = File::open(path).and_then(|mut file| {
                    file.seek(SeekFrom::Start(from))?;
                    Ok(file.take(length))
                });
                let file = opened.map_err(|error| Fault::Final(io(path)(error)))?;
                let mut reader = Watched::new(file, &call.what, length, self.stop);
                // Storage takes no body of unknown length.
                let request = request
                    .header("content-length", length)
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(|_| self.unusable(call))?;
                self.agent.run(request)
            }
        };
        sent.map_err(|error| match error {
            _ if self.stop.is_cancelled() => Fault::Final(HubError::Stopped),
            // Their words may hold an address with a signature in it.
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => self.unusable(call),
            error => Fault::Passing(error.to_string(), None),
        })
    }

    fn unusable(&self, call: &Call<'_>) -> Fault {
        Fault::Final(HubError::Answer {
            what: call.what.clone(),
            cause: "an address or a header can't be used".to_owned(),
        })
    }

    /// What a server says of its refusal.
    fn said(&self, header: Option<String>, body: &str) -> String {
        #[derive(serde::Deserialize)]
        struct Said {
            error: Option<String>,
            message: Option<String>,
        }
        let json: Option<Said> = serde_json::from_str(body).ok();
        let said = json.and_then(|said| said.error.or(said.message)).or(header);
        let Some(said) = said.filter(|said| !said.trim().is_empty()) else {
            return String::new();
        };
        self.repeated(&said)
    }

    /// A server's words, on one line and after a colon: not all of them, and not the token.
    pub(super) fn repeated(&self, said: &str) -> String {
        let said = match &self.settings.token {
            Some(token) => token.redact(said),
            None => said.to_owned(),
        };
        let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
        let shown: String = line.chars().take(MAX_SAID).collect();
        format!(": {shown}")
    }
}

/// A body on its way: says how far it is while it takes long, and ends when a stop is asked for.
struct Watched<'a, R> {
    inner: R,
    what: &'a str,
    length: u64,
    done: u64,
    said: Instant,
    stop: &'a CancellationToken,
}

impl<'a, R> Watched<'a, R> {
    fn new(inner: R, what: &'a str, length: u64, stop: &'a CancellationToken) -> Self {
        Self {
            inner,
            what,
            length,
            done: 0,
            said: Instant::now(),
            stop,
        }
    }
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(std::io::Error::other("stopped"));
        }
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        if self.said.elapsed() >= LINE_EVERY {
            self.said = Instant::now();
            errln!(
                "  {}: {} of {}",
                self.what,
                DecimalBytes(self.done),
                DecimalBytes(self.length)
            );
        }
        Ok(read)
    }
}
