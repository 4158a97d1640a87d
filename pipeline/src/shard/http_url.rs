//! `http(s)://` URLs of shards, which may hold a password or a signature.

use std::fmt;

use crate::text::{redact_url, user_end};

/// Prefixes of the parameters of signed URLs: AWS and compatible servers, Google Cloud Storage, Alibaba Cloud.
const SIGNATURE_PREFIXES: [&str; 3] = ["x-amz-", "x-goog-", "x-oss-"];
/// Parameters of signed URLs: the older forms of S3, Google, Alibaba, and CloudFront.
const SIGNATURES: [&str; 8] = [
    "signature",
    "expires",
    "policy",
    "key-pair-id",
    "awsaccesskeyid",
    "googleaccessid",
    "ossaccesskeyid",
    "security-token",
];
/// Parameters of Azure's shared access signatures, next to `sig`.
const AZURE: [&str; 19] = [
    "sig", "sv", "ss", "srt", "sr", "sp", "st", "se", "spr", "sip", "si", "sdd", "skoid", "sktid",
    "skt", "ske", "sks", "skv", "saoid",
];

/// A whole URL. `Display` and `Debug` show it without its user, password and query; only requests use the rest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HttpUrl(String);

impl HttpUrl {
    pub(crate) fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// The whole URL, for a request.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    /// The URL without user, password and signature: new signatures leave it as it is. Other parameters stay, because
    /// they may choose the object, so it is input for a hash and not for a message.
    pub(super) fn identity(&self) -> String {
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return self.0.clone();
        };
        let rest = user_end(rest).map_or(rest, |at| &rest[at + 1..]);
        let Some((plain, query)) = rest.split_once('?') else {
            return format!("{scheme}://{rest}");
        };
        let name = |parameter: &str| {
            let name = parameter.split('=').next().unwrap_or_default();
            name.to_ascii_lowercase()
        };
        let in_azure = query.split('&').any(|parameter| name(parameter) == "sig");
        let is_signature = |parameter: &str| {
            let name = name(parameter);
            SIGNATURE_PREFIXES.iter().any(|it| name.starts_with(it))
                || SIGNATURES.contains(&name.as_str())
                || (in_azure && AZURE.contains(&name.as_str()))
        };
        let mut identity = format!("{scheme}://{plain}");
        let mut separator = '?';
        for parameter in query
            .split('&')
            .filter(|parameter| !is_signature(parameter))
        {
            identity.push(separator);
            identity.push_str(parameter);
            separator = '&';
        }
        identity
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_url(&self.0))
    }
}

impl fmt::Debug for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&redact_url(&self.0), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_url_shows_no_secret() {
        let url = HttpUrl::new("https://me:s3cret@h/a.tar?X-Amz-Signature=s3cret");
        assert_eq!(url.to_string(), "https://REDACTED@h/a.tar?REDACTED");
        assert_eq!(format!("{url:?}"), "\"https://REDACTED@h/a.tar?REDACTED\"");
        assert!(url.expose().contains("me:s3cret@h"));
    }

    #[test]
    fn http_url_identity_ignores_signatures() {
        for (url, identity) in [
            ("https://h/a.tar", "https://h/a.tar"),
            ("https://h/a.tar?", "https://h/a.tar?"),
            ("https://h/?id=1", "https://h/?id=1"),
            ("https://u:p@h/?id=2&v=1", "https://h/?id=2&v=1"),
            (
                "https://h/a.tar?X-Amz-Date=1&versionId=7&x-amz-signature=s",
                "https://h/a.tar?versionId=7",
            ),
            (
                "https://h/a.tar?AWSAccessKeyId=k&Signature=s&Expires=1",
                "https://h/a.tar",
            ),
            ("https://h/a.tar?sv=1&sp=r&sig=s&x=1", "https://h/a.tar?x=1"),
            ("https://h/a.tar?sv=1&sp=r", "https://h/a.tar?sv=1&sp=r"),
        ] {
            assert_eq!(HttpUrl::new(url).identity(), identity);
        }
    }
}
