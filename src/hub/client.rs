//! Requests to the Hub and to the storage it names, with retries, an idle timeout and an end at a stop.

use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::DecimalBytes;
use serde::de::DeserializeOwned;
use ureq::Agent;
use ureq::SendBody;
use ureq::http::{Request, Response};

use coffey_pipeline::bounded::{self, TooLong};

use super::retry::{self, AttemptError, MAX_ATTEMPTS};
use super::{HubError, Settings, io};
use tokio_util::sync::CancellationToken;

/// Largest response body that is read: the LFS batch response has an address for each part of each file. Bytes.
const MAX_RESPONSE: u64 = 64 << 20;
/// Most bytes that are read of an error's body.
const MAX_ERROR: u64 = 64 << 10;
/// Longest server message in an error. Characters.
const MAX_MESSAGE: usize = 300;
/// Time between two progress lines about one file.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);
/// Content type of Git LFS messages.
pub(super) const LFS: &str = "application/vnd.git-lfs+json";

#[derive(Clone, Copy, Debug)]
pub(super) enum RequestBody<'a> {
    Empty,
    Text {
        text: &'a str,
        content_type: &'static str,
    },
    /// `length` bytes of a file from `offset` on.
    FilePart {
        path: &'a Path,
        offset: u64,
        length: u64,
    },
}

/// A request.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// The action, to follow "can't" in an error.
    pub(super) what: String,
    pub(super) method: &'static str,
    pub(super) url: &'a str,
    /// Headers besides authorization, content type and length.
    pub(super) headers: Vec<(&'a str, &'a str)>,
    pub(super) body: RequestBody<'a>,
    /// Status codes that are not errors, besides 2xx.
    pub(super) expects: &'static [u16],
}

/// A response that is not an error.
#[derive(Debug)]
pub(super) struct HubResponse {
    what: String,
    pub(super) status: u16,
    pub(super) etag: Option<String>,
    text: String,
}

impl HubResponse {
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, HubError> {
        serde_json::from_str(&self.text).map_err(|error| HubError::InvalidResponse {
            what: self.what.clone(),
            cause: error.to_string(),
        })
    }
}

/// Sends requests about one repository.
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
            // A streamed body can't be sent again, and the token must not go to another host.
            .max_redirects(0)
            .timeout_connect(Some(settings.idle_timeout))
            .timeout_per_read(Some(settings.idle_timeout))
            .timeout_per_write(Some(settings.idle_timeout))
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

    /// URL of a path on the Hub.
    pub(super) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.settings.endpoint)
    }

    /// Whether a URL is on the Hub itself; only then the token is sent.
    fn is_own(&self, url: &str) -> bool {
        url.strip_prefix(&self.settings.endpoint)
            .is_some_and(|rest| rest.starts_with('/'))
    }

    /// Sends a request, with retries.
    pub(super) fn call(&self, call: &Call<'_>) -> Result<HubResponse, HubError> {
        self.retry(&call.what, || self.once(call))
    }

    /// Retries `attempt`; `what` is the action, to follow "can't" in the error.
    pub(super) fn retry<T>(
        &self,
        what: &str,
        attempt: impl FnMut() -> Result<T, AttemptError<HubError>>,
    ) -> Result<T, HubError> {
        retry::retry(self.stop, attempt, |cause| HubError::Unreachable {
            what: what.to_owned(),
            attempts: MAX_ATTEMPTS,
            cause,
        })
    }

    /// Sends a request once.
    pub(super) fn once(&self, call: &Call<'_>) -> Result<HubResponse, AttemptError<HubError>> {
        if self.stop.is_cancelled() {
            return Err(AttemptError::Permanent(HubError::Stopped));
        }
        let own = self.is_own(call.url);
        let mut response = self.send(call, own)?;
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let (etag, retry_after) = (header("etag"), header("retry-after"));
        let message = header("x-error-message");
        let status = response.status().as_u16();
        let body = response.body_mut().as_reader();
        if (200..300).contains(&status) || call.expects.contains(&status) {
            let text = bounded::read(body, MAX_RESPONSE).map_err(|error| {
                match error
                    .get_ref()
                    .and_then(|inner| inner.downcast_ref::<TooLong>())
                {
                    Some(too_long) => AttemptError::Permanent(HubError::InvalidResponse {
                        what: call.what.clone(),
                        cause: format!("it {too_long}"),
                    }),
                    None => AttemptError::transient(error),
                }
            })?;
            let text = String::from_utf8_lossy(&text).into_owned();
            return Ok(HubResponse {
                what: call.what.clone(),
                status,
                etag,
                text,
            });
        }
        let mut text = Vec::new();
        // What came before a fault is the message.
        body.take(MAX_ERROR).read_to_end(&mut text).ok();
        let message = self.error_message(message, &String::from_utf8_lossy(&text));
        let what = call.what.clone();
        Err(AttemptError::Permanent(match status {
            401 if own => HubError::WrongToken {
                endpoint: self.settings.endpoint.clone(),
            },
            403 if own => HubError::Forbidden {
                endpoint: self.settings.endpoint.clone(),
                id: self.id.to_owned(),
                what,
                message,
            },
            301 | 302 | 307 | 308 if own => HubError::Moved {
                what,
                id: self.id.to_owned(),
            },
            408 | 429 | 500 | 502 | 503 | 504 => {
                let seconds = retry_after.and_then(|seconds| seconds.parse().ok());
                return Err(AttemptError::Transient {
                    cause: format!("HTTP {status}{message}"),
                    retry_after: seconds.map(Duration::from_secs),
                });
            }
            status => HubError::Refused {
                what,
                status,
                message,
            },
        }))
    }

    fn send(
        &self,
        call: &Call<'_>,
        own: bool,
    ) -> Result<Response<ureq::Body>, AttemptError<HubError>> {
        let mut request = Request::builder().method(call.method).uri(call.url);
        if let (true, Some(token)) = (own, &self.settings.token) {
            request = request.header("authorization", format!("Bearer {}", token.secret()));
        }
        for (name, value) in &call.headers {
            request = request.header(*name, *value);
        }
        let sent = match call.body {
            RequestBody::Empty => {
                let request = request.body(()).map_err(|_| invalid_request(call))?;
                self.agent.run(request)
            }
            RequestBody::Text { text, content_type } => {
                let request = request.header("content-type", content_type).body(text);
                self.agent.run(request.map_err(|_| invalid_request(call))?)
            }
            RequestBody::FilePart {
                path,
                offset,
                length,
            } => {
                let opened = File::open(path).and_then(|mut file| {
                    file.seek(SeekFrom::Start(offset))?;
                    Ok(file.take(length))
                });
                let file = opened.map_err(|error| AttemptError::Permanent(io(path)(error)))?;
                let mut reader = ProgressReader::new(file, &call.what, length, self.stop);
                // The storage refuses bodies of unknown length.
                let request = request
                    .header("content-length", length)
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(|_| invalid_request(call))?;
                self.agent.run(request)
            }
        };
        sent.map_err(|error| match error {
            _ if self.stop.is_cancelled() => AttemptError::Permanent(HubError::Stopped),
            // These errors print the URL, which may hold a signature.
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => invalid_request(call),
            error => AttemptError::transient(error),
        })
    }

    /// `: ` and the server's message from the response's body or header; empty without a message.
    fn error_message(&self, header: Option<String>, body: &str) -> String {
        #[derive(serde::Deserialize)]
        struct ErrorBody {
            error: Option<String>,
            message: Option<String>,
        }
        let json: Option<ErrorBody> = serde_json::from_str(body).ok();
        let message = json.and_then(|body| body.error.or(body.message)).or(header);
        let Some(message) = message.filter(|message| !message.trim().is_empty()) else {
            return String::new();
        };
        self.quoted(&message)
    }

    /// `: ` and a server's message: on one line, shortened, without the token.
    pub(super) fn quoted(&self, message: &str) -> String {
        let message = match &self.settings.token {
            Some(token) => token.redact(message),
            None => message.to_owned(),
        };
        let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
        let shown: String = line.chars().take(MAX_MESSAGE).collect();
        format!(": {shown}")
    }
}

fn invalid_request(call: &Call<'_>) -> AttemptError<HubError> {
    AttemptError::Permanent(HubError::InvalidResponse {
        what: call.what.clone(),
        cause: "it names an invalid URL or header".to_owned(),
    })
}

/// An upload that prints its progress, and fails when a stop is asked for.
struct ProgressReader<'a, R> {
    inner: R,
    what: &'a str,
    length: u64,
    done: u64,
    printed: Instant,
    stop: &'a CancellationToken,
}

impl<'a, R> ProgressReader<'a, R> {
    fn new(inner: R, what: &'a str, length: u64, stop: &'a CancellationToken) -> Self {
        Self {
            inner,
            what,
            length,
            done: 0,
            printed: Instant::now(),
            stop,
        }
    }
}

impl<R: Read> Read for ProgressReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(std::io::Error::other("stopped"));
        }
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        if self.printed.elapsed() >= PROGRESS_INTERVAL {
            self.printed = Instant::now();
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
