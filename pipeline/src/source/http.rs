//! Plain HTTP(S): one request at a time. The caller retries.

use std::time::Duration;

use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE,
};
use reqwest::{Client, Response, StatusCode};

use crate::net::{
    Body, CaBundle, Condition, GetResult, RequestFailure, ServerMessage, SourceError, causes,
    certificate_error, content_range, is_passing,
};
use crate::shard::ShardUrl;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client for all HTTP shards, which trusts `ca_bundle` besides the system's authorities.
pub(crate) fn client(ca_bundle: Option<&CaBundle>) -> Result<Client, SourceError> {
    // Fails only if the process has chosen a provider already, which serves as well.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .user_agent(concat!("coffey/", env!("CARGO_PKG_VERSION")))
        .tls_certs_merge(ca_bundle.map(CaBundle::certificates).unwrap_or_default())
        .build()
        .map_err(|error| SourceError::Unsupported {
            url: "http(s)://".to_owned(),
            cause: format!(
                "no HTTP client: {}; where the system has no certificates, set [s3] ca_bundle or SSL_CERT_FILE",
                causes(&error)
            ),
        })
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Requests `address` from byte `offset` on; `None` if the condition does not hold.
pub(crate) async fn get(
    client: &Client,
    url: &ShardUrl,
    address: &str,
    offset: u64,
    condition: Condition<'_>,
) -> Result<Option<GetResult>, RequestFailure> {
    let mut request = client.get(address);
    if offset > 0 {
        request = request.header(RANGE, format!("bytes={offset}-"));
    }
    // A version is an ETag or a date.
    let is_tag = |version: &str| version.starts_with('"');
    request = match condition {
        Condition::None => request,
        Condition::Is(version) if is_tag(version) => request.header(IF_MATCH, version),
        Condition::Is(date) => request.header(IF_UNMODIFIED_SINCE, date),
        Condition::IsNot(version) if is_tag(version) => request.header(IF_NONE_MATCH, version),
        Condition::IsNot(date) => request.header(IF_MODIFIED_SINCE, date),
    };
    let response = request.send().await.map_err(|error| {
        let (wrong_url, redirected) = (error.is_builder(), error.is_redirect());
        let connecting = error.is_connect();
        let cause = causes(&error.without_url());
        if wrong_url || redirected {
            let url = url.redacted();
            return RequestFailure::Fatal(if wrong_url {
                SourceError::Unsupported { url, cause }
            } else {
                SourceError::Refused { url, cause }
            });
        }
        let endpoint = url.redacted();
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
            hint: " and the URL",
        }
    })?;
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

async fn refusal(url: &ShardUrl, mut response: Response, offset: u64) -> RequestFailure {
    let status = response.status();
    let is_signed = response.url().query().is_some();
    let said = ServerMessage::parse(&error_text(&mut response).await);
    let text = said.to_string();
    let separator = if text.is_empty() { "" } else { ": " };
    let cause = format!("HTTP {status}{separator}{text}");
    let url = url.redacted();
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
        401 | 403 if is_signed => forbidden(
            "the server does not accept the URL's signature: copy the whole URL (quote it in a shell), or make a new one",
        ),
        401 | 403 => forbidden("the server wants a login or a signed URL"),
        412 | 416 if offset > 0 => {
            RequestFailure::Fatal(SourceError::Changed { url, offset, cause })
        }
        400 | 405 | 501 => RequestFailure::Unsupported(SourceError::Refused { url, cause }),
        _ => RequestFailure::Fatal(SourceError::Refused { url, cause }),
    }
}
