//! The meaning of an error response: its text, and whether a retry may change it.

/// Longest text taken from a response. Characters.
const LONGEST: usize = 300;
/// Codes of objects in an archive: S3, then Azure.
const ARCHIVED: [&str; 3] = ["InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"];
/// Codes of a signature or token that has expired.
const EXPIRED: [&str; 5] = [
    "ExpiredToken",
    "ExpiredTokenException",
    "ExpiredRequest",
    "RequestExpired",
    "TokenRefreshRequired",
];

/// Whether a response with this status may be followed by another one: the request came at the wrong
/// time. Every other refusal is final, such as 501 (not implemented) and 507 (no space).
pub(crate) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502..=504 | 509 | 520..=524 | 529 | 598 | 599)
}

/// The text of an error response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ServerMessage {
    /// The error code of S3, Azure or Google Cloud Storage; empty where there is none.
    pub(crate) code: String,
    /// One line; empty where there is none.
    pub(crate) message: String,
}

impl ServerMessage {
    pub(crate) fn new(code: &str, message: &str) -> Self {
        Self {
            code: one_line(code),
            message: one_line(message),
        }
    }

    /// Reads the XML of an object store, JSON with an `error` or a `message`, or a short plain text. A page
    /// in HTML has no text that helps.
    pub(crate) fn parse(body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.starts_with('<') {
            let details = ["Message", "Details", "AuthenticationErrorDetail"];
            let message: Vec<_> = details
                .iter()
                .filter_map(|name| element(text, name))
                .collect();
            return Self {
                code: element(text, "Code").unwrap_or_default(),
                message: one_line(&message.join(" ")),
            };
        }
        match serde_json::from_str::<serde_json::Value>(text) {
            Ok(json) => Self {
                code: String::new(),
                message: one_line(json_message(&json).unwrap_or_default()),
            },
            Err(_) => Self {
                code: String::new(),
                message: one_line(text),
            },
        }
    }

    /// Whether the object must be restored from an archive before it can be read.
    pub(crate) fn is_archived(&self) -> bool {
        ARCHIVED.contains(&self.code.as_str())
    }

    /// Whether the signature or the token of the request has expired.
    pub(crate) fn is_expired(&self) -> bool {
        let message = self.message.to_lowercase();
        EXPIRED.contains(&self.code.as_str())
            || message.contains("expired")
            // Azure
            || message.contains("signed expiry time")
            || message.contains("not valid in the specified time frame")
    }
}

impl std::fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let separator = if self.code.is_empty() || self.message.is_empty() {
            ""
        } else {
            " "
        };
        write!(f, "{}{separator}{}", self.code, self.message)
    }
}

/// The text of the first XML element of this name.
pub(crate) fn element(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let text = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&apos;", "'"),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ]
    .into_iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    Some(one_line(&text))
}

fn json_message(json: &serde_json::Value) -> Option<&str> {
    let error = json.get("error").unwrap_or(json);
    error.as_str().or_else(|| error.get("message")?.as_str())
}

/// `text` on one line, without control characters, cut where it is long.
pub(crate) fn one_line(text: &str) -> String {
    let words: Vec<_> = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect();
    let line = words.join(" ");
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> ServerMessage {
        ServerMessage::parse(body.as_bytes())
    }

    #[test]
    fn server_message_is_read_from_every_form() {
        for (body, text) in [
            (
                "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>a &lt;b&gt;\n c</Message></Error>",
                "AccessDenied a <b> c",
            ),
            ("\u{feff}<Error><Code>Busy</Code></Error>", "Busy"),
            (r#"{"error": "Invalid username"}"#, "Invalid username"),
            (r#"{"error": {"code": 403, "message": "no"}}"#, "no"),
            (r#"{"message": "Not here"}"#, "Not here"),
            ("bad signature\x1b[2J\r\n", "bad signature [2J"),
            ("<html><title>login</title></html>", ""),
            ("", ""),
        ] {
            assert_eq!(parse(body).to_string(), text, "{body:?}");
        }
        let long = parse(&"é".repeat(1000)).message;
        assert_eq!(long.chars().count(), LONGEST + 1);
    }

    #[test]
    fn expired_signatures_are_told_in_the_words_of_each_store() {
        for body in [
            // AWS, a presigned URL; the same with temporary credentials.
            "<Error><Code>AccessDenied</Code><Message>Request has expired</Message><X-Amz-Expires>60</X-Amz-Expires></Error>",
            "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
            // Google Cloud Storage
            "<Error><Code>ExpiredToken</Code><Message>Invalid argument.</Message><Details>Request signature expired at: 2024-01-01T00:00:00+00:00</Details></Error>",
            // Azure
            "<Error><Code>AuthenticationFailed</Code><Message>Server failed to authenticate the request.</Message><AuthenticationErrorDetail>Signature not valid in the specified time frame: Start [a] - Expiry [b] - Current [c]</AuthenticationErrorDetail></Error>",
            "<Error><Code>AuthenticationFailed</Code><AuthenticationErrorDetail>Signed expiry time [a] must be after signed start time [b]</AuthenticationErrorDetail></Error>",
            // Cloudflare R2
            "<Error><Code>ExpiredRequest</Code><Message>Request has been refused</Message></Error>",
        ] {
            assert!(parse(body).is_expired(), "{body}");
        }
        assert!(!parse("<Error><Code>AccessDenied</Code></Error>").is_expired());
        assert!(parse("<Error><Code>BlobArchived</Code></Error>").is_archived());
    }

    #[test]
    fn final_statuses_are_not_retried() {
        for status in [408, 425, 429, 500, 502, 503, 504, 509, 522, 529] {
            assert!(is_passing(status), "{status}");
        }
        for status in [
            400, 401, 403, 404, 405, 409, 411, 412, 413, 416, 451, 501, 505, 507, 508, 511, 526,
        ] {
            assert!(!is_passing(status), "{status}");
        }
    }
}
