//! Plain HTTP(S): one request at a time. The caller retries.
//!
//! Redirects are followed here, because the headers of one server may hold a secret that no other server may see.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_UNMODIFIED_SINCE, LAST_MODIFIED, LOCATION, RANGE,
};
use reqwest::redirect::Policy;
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::headers::ServerHeaders;
use crate::net::{
    Body, CaBundle, Condition, GetResult, RequestFailure, ServerMessage, SourceError, causes,
    certificate_error, content_range, is_passing,
};
use crate::open_files;
use crate::shard::{Location, ShardUrl};
use crate::text::{remove_secrets_of, remove_values};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const MOST_REDIRECTS: usize = 10;
/// A response's fault, as the Hub names it.
const HUB_ERROR: &str = "x-error-message";

/// The client for all HTTP shards. Cloning shares connections.
#[derive(Debug, Clone)]
pub(crate) struct HttpClient {
    client: Client,
    headers: Arc<ServerHeaders>,
}

impl HttpClient {
    /// A client that trusts `ca_bundle` besides the system's authorities.
    pub(super) fn new(
        ca_bundle: Option<&CaBundle>,
        headers: ServerHeaders,
    ) -> Result<Self, SourceError> {
        // Fails only if the process has chosen a provider already, which serves as well.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::none())
            .user_agent(concat!("coffey/", env!("CARGO_PKG_VERSION")))
            .tls_certs_merge(ca_bundle.map(CaBundle::certificates).unwrap_or_default())
            .build()
            .map_err(|error| SourceError::Unsupported {
                url: "http(s)://".to_owned(),
                cause: format!(
                    "no HTTP client: {}; where the system has no certificates, set [s3] ca_bundle or SSL_CERT_FILE",
                    causes(&error)
                ),
            })?;
        Ok(Self {
            client,
            headers: Arc::new(headers),
        })
    }

    /// Sends a request, and follows redirects. Any status is a response.
    pub(super) async fn send(
        &self,
        url: &ShardUrl,
        method: Method,
        address: &str,
        fields: &HeaderMap,
    ) -> Result<Response, RequestFailure> {
        let refused = |cause: String| {
            RequestFailure::Fatal(SourceError::Refused {
                url: url.to_string(),
                cause,
            })
        };
        let mut at = Url::parse(address).map_err(|error| {
            RequestFailure::Fatal(SourceError::Unsupported {
                url: url.to_string(),
                cause: format!("is no valid URL: {error}"),
            })
        })?;
        let first = at.origin();
        let mut sent = SentValues::default();
        for _ in 0..=MOST_REDIRECTS {
            let mut headers = fields.clone();
            if at.origin() == first {
                headers.extend(self.headers.of(&at));
            }
            let request = self.client.request(method.clone(), at.clone());
            let request = request
                .headers(headers)
                .build()
                .map_err(|error| failure(url, error))?;
            sent.note(request.headers());
            let mut response = self
                .client
                .execute(request)
                .await
                .map_err(|error| failure(url, error))?;
            let target = match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => response.headers().get(LOCATION),
                _ => None,
            };
            let Some(target) = target else {
                response.extensions_mut().insert(sent);
                return Ok(response);
            };
            at = target
                .to_str()
                .ok()
                .and_then(|target| at.join(target).ok())
                .filter(|target| ["http", "https"].contains(&target.scheme()))
                .ok_or_else(|| refused("is redirected to no http(s):// URL".to_owned()))?;
        }
        Err(refused(format!(
            "is redirected more than {MOST_REDIRECTS} times"
        )))
    }

    /// Requests `address` from byte `offset` on; `None` if the condition does not hold.
    pub(super) async fn get(
        &self,
        url: &ShardUrl,
        address: &str,
        offset: u64,
        condition: Condition<'_>,
    ) -> Result<Option<GetResult>, RequestFailure> {
        let mut fields = HeaderMap::new();
        let mut set = |name: HeaderName, value: &str| {
            if let Ok(value) = HeaderValue::from_str(value) {
                fields.insert(name, value);
            }
        };
        if offset > 0 {
            set(RANGE, &format!("bytes={offset}-"));
        }
        // A version is an ETag or a date.
        let is_tag = |version: &str| version.starts_with('"');
        match condition {
            Condition::None => {}
            Condition::Is(version) if is_tag(version) => set(IF_MATCH, version),
            Condition::Is(date) => set(IF_UNMODIFIED_SINCE, date),
            Condition::IsNot(version) if is_tag(version) => set(IF_NONE_MATCH, version),
            Condition::IsNot(date) => set(IF_MODIFIED_SINCE, date),
        }
        let response = self.send(url, Method::GET, address, &fields).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(refusal(url, response, offset).await);
        }
        let headers = response.headers();
        let length = header(headers, CONTENT_LENGTH).and_then(|length| length.parse().ok());
        let (start, total) = header(headers, CONTENT_RANGE)
            .and_then(|range| content_range(&range))
            .unwrap_or((0, length));
        // A weak tag does not promise equal bytes, which resuming needs.
        let tag = header(headers, ETAG).filter(|tag| tag.starts_with('"'));
        Ok(Some(GetResult {
            start,
            total,
            version: tag.or_else(|| header(headers, LAST_MODIFIED)),
            body: Body::Http(response),
        }))
    }
}

/// The secret values of the headers that were sent: those of the configuration, the Hub's token and the login of the URL.
#[derive(Debug, Clone, Default)]
struct SentValues(Vec<HeaderValue>);

impl SentValues {
    fn note(&mut self, headers: &HeaderMap) {
        let secrets = headers.values().filter(|value| value.is_sensitive());
        self.0.extend(secrets.cloned());
    }

    /// `text` without the values.
    fn remove_from(&self, text: &str) -> String {
        remove_values(self.0.iter().filter_map(|value| value.to_str().ok()), text)
    }
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The failure of a request without a response.
fn failure(url: &ShardUrl, error: reqwest::Error) -> RequestFailure {
    if open_files::is_cause_of(&error) {
        return RequestFailure::OpenFiles;
    }
    let (wrong_url, connecting) = (error.is_builder(), error.is_connect());
    let cause = causes(&error.without_url());
    let endpoint = url.to_string();
    if wrong_url {
        return RequestFailure::Fatal(SourceError::Unsupported {
            url: endpoint,
            cause,
        });
    }
    if let Some(error) = certificate_error(url, &endpoint, &cause) {
        return RequestFailure::Fatal(error);
    }
    if !connecting {
        return RequestFailure::Passing {
            reason: "bad_response",
            cause,
        };
    }
    RequestFailure::Connect {
        cause,
        endpoint,
        hint: if has_proxy() {
            ", the URL and the proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)"
        } else {
            " and the URL"
        },
    }
}

/// Whether the environment names a proxy.
fn has_proxy() -> bool {
    ["https_proxy", "http_proxy", "all_proxy"]
        .iter()
        .any(|name| {
            let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
            set(name) || set(&name.to_uppercase())
        })
}

/// Longest error text that is read. Bytes.
const ERROR_BYTES: usize = 16 << 10;
/// Longest wait for it.
const ERROR_PATIENCE: Duration = Duration::from_secs(5);

/// The start of a response's body, as far as it comes.
async fn error_text(response: &mut Response) -> Vec<u8> {
    let mut text = Vec::new();
    let read = async {
        while text.len() < ERROR_BYTES
            && let Ok(Some(chunk)) = response.chunk().await
        {
            text.extend_from_slice(&chunk);
        }
    };
    tokio::time::timeout(ERROR_PATIENCE, read).await.ok();
    text.truncate(ERROR_BYTES);
    text
}

/// The meaning of a response that is no success.
pub(super) async fn refusal(url: &ShardUrl, mut response: Response, offset: u64) -> RequestFailure {
    let status = response.status();
    let is_signed = response.url().query().is_some();
    let sent = response.extensions_mut().remove::<SentValues>();
    let sent = sent.unwrap_or_default();
    let body = error_text(&mut response).await;
    let asked = response.url().clone();
    let clean = |text: &str| {
        let text = remove_secrets_of(asked.as_str(), &sent.remove_from(text));
        match url.location() {
            Location::Http(url) => remove_secrets_of(url.expose(), &text),
            _ => text,
        }
    };
    // Before the text is cut within a secret.
    let said = ServerMessage::parse(clean(&String::from_utf8_lossy(&body)).as_bytes());
    let on_hub = matches!(url.location(), Location::Hub(_));
    let message = response.headers().get(HUB_ERROR);
    let text = match message.and_then(|message| message.to_str().ok()) {
        Some(message) if on_hub => message.to_owned(),
        _ => said.to_string(),
    };
    // And after its escapes are replaced.
    let text = clean(&text);
    let separator = if text.is_empty() { "" } else { ": " };
    let cause = format!("HTTP {status}{separator}{text}");
    let url = url.to_string();
    let forbidden = |hint| {
        let (url, cause) = (url.clone(), cause.clone());
        RequestFailure::Fatal(SourceError::Forbidden { url, cause, hint })
    };
    if said.is_archived() {
        return RequestFailure::Fatal(SourceError::Archived { url, cause });
    }
    match status.as_u16() {
        429 => RequestFailure::Passing {
            reason: "throttled",
            cause,
        },
        status if is_passing(status) => RequestFailure::Passing {
            reason: "server_error",
            cause,
        },
        400 | 401 | 403 | 410 if said.is_expired() && is_signed => {
            RequestFailure::Fatal(SourceError::ExpiredUrl { url, cause })
        }
        401 | 403 if said.is_expired() => forbidden("renew the login that it speaks of"),
        404 | 410 => RequestFailure::Fatal(SourceError::NotFound {
            url,
            cause,
            hint: " and the range in braces",
        }),
        401 | 403 if on_hub => forbidden(
            "check the name; for a private or gated repository set HF_TOKEN to a token that may read it (or log in with `hf auth login`), and accept its terms on the Hub",
        ),
        401 | 403 if is_signed => forbidden(
            "the server does not accept the URL's signature: copy the whole URL (quote it in a shell), or make a new one",
        ),
        401 | 403 => forbidden(
            "the server wants a login or a signed URL: data.http_headers sets a header, as \"Authorization\"",
        ),
        412 | 416 if offset > 0 => {
            RequestFailure::Fatal(SourceError::Changed { url, offset, cause })
        }
        400 | 405 | 501 => RequestFailure::Unsupported(SourceError::Refused { url, cause }),
        _ => RequestFailure::Fatal(SourceError::Refused { url, cause }),
    }
}
