//! Headers that are sent with requests for HTTP shards: to one server, and with the secret from the environment.

use std::str::FromStr;

use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};

use super::options::HubOptions;
use crate::net::SourceError;
use crate::text::is_auth_scheme;

const FORM: &str = "the form is \"https://HOST NAME: VALUE\", with ${VARIABLE} in the value for an environment variable";

/// A header of requests to one server, `https://HOST NAME: VALUE`. The value names at least one environment variable, as
/// `Bearer ${TOKEN}`, so that no configuration holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpHeader {
    /// Scheme, host and port.
    origin: String,
    name: HeaderName,
    /// The value before variables are replaced.
    template: String,
}

impl FromStr for HttpHeader {
    type Err = String;

    /// # Errors
    /// The fault and the right form, without the value.
    fn from_str(text: &str) -> Result<Self, String> {
        let (server, field) = text
            .trim()
            .split_once(char::is_whitespace)
            .ok_or_else(|| format!("has no header; {FORM}"))?;
        let url = Url::parse(server)
            .ok()
            .filter(|url| ["http", "https"].contains(&url.scheme()))
            .filter(|url| url.username().is_empty() && url.password().is_none())
            .filter(|url| url.path() == "/" && url.query().is_none() && url.fragment().is_none())
            .ok_or_else(|| format!("does not begin with a server and a space; {FORM}"))?;
        let (name, template) = field
            .split_once(':')
            .ok_or_else(|| format!("has no ':' after the header's name; {FORM}"))?;
        let name = HeaderName::from_str(name.trim())
            .map_err(|_| format!("has no valid name of a header; {FORM}"))?;
        let own = [
            "host",
            "range",
            "connection",
            "content-length",
            "transfer-encoding",
            "accept-encoding",
        ];
        if own.contains(&name.as_str()) || name.as_str().starts_with("if-") {
            return Err(format!("sets the header {name}, which coffey sets itself"));
        }
        let header = Self {
            origin: url.origin().ascii_serialization(),
            name,
            template: template.trim().to_owned(),
        };
        let mut variables = 0;
        header.fill(|_| {
            variables += 1;
            Some("x".to_owned())
        })?;
        if variables > 0 && !header.is_free_of_secrets() {
            return Err(format!(
                "has text beside the variable, which may be a secret: put the whole value in the variable; only a word as Bearer and a \
                 space may stand before it; {FORM}"
            ));
        }
        if variables == 0 {
            return Err(format!(
                "holds the value itself, which a run writes to its config.toml: put it in an environment variable; {FORM}"
            ));
        }
        Ok(header)
    }
}

impl HttpHeader {
    /// Whether the value holds nothing but variables, after an authorization scheme and a space.
    fn is_free_of_secrets(&self) -> bool {
        let mut texts = self
            .template
            .split("${")
            .enumerate()
            .map(|(index, part)| match index {
                0 => part,
                _ => part.split_once('}').map_or("", |(_, text)| text),
            });
        let first = texts.next().unwrap_or_default();
        let is_scheme = first.ends_with(' ') && is_auth_scheme(first.trim());
        (first.is_empty() || is_scheme) && texts.all(|text| text.trim().is_empty())
    }

    /// The value, with each `${NAME}` replaced.
    fn fill(
        &self,
        mut variable: impl FnMut(&str) -> Option<String>,
    ) -> Result<HeaderValue, String> {
        let mut value = String::new();
        let mut rest = self.template.as_str();
        while let Some((before, after)) = rest.split_once("${") {
            let (name, after) = after
                .split_once('}')
                .ok_or_else(|| format!("has a \"${{\" without a '}}'; {FORM}"))?;
            value.push_str(before);
            value.push_str(
                &variable(name)
                    .ok_or_else(|| format!("the environment variable {name} is not set"))?,
            );
            rest = after;
        }
        value.push_str(rest);
        let mut value = HeaderValue::from_str(value.trim())
            .map_err(|_| "its value has a character that no header may have".to_owned())?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The headers of every server.
#[derive(Debug, Clone, Default)]
pub(super) struct ServerHeaders(Vec<(String, HeaderName, HeaderValue)>);

impl ServerHeaders {
    /// Takes variables from the environment. A configured `Authorization` precedes the Hub's token.
    ///
    /// # Errors
    /// [`SourceError::Header`] for a variable that is not set or a value that can't be sent.
    pub(super) fn new(headers: &[HttpHeader], hub: &HubOptions) -> Result<Self, SourceError> {
        let mut all = Self::default();
        for header in headers {
            let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
            let value = header.fill(variable).map_err(|cause| SourceError::Header {
                header: format!("{} {}", header.origin, header.name),
                cause,
            })?;
            all.0
                .push((header.origin.clone(), header.name.clone(), value));
        }
        let endpoint = hub
            .endpoint
            .as_ref()
            .ok()
            .and_then(|url| Url::parse(url).ok());
        if let (Some(endpoint), Some(token)) = (endpoint, &hub.token) {
            let origin = endpoint.origin().ascii_serialization();
            let is_set = |(server, name, _): &(String, HeaderName, _)| {
                *server == origin && *name == AUTHORIZATION
            };
            if !all.0.iter().any(is_set) {
                let value = HeaderValue::from_str(&format!("Bearer {token}"));
                let mut value = value.map_err(|_| SourceError::Header {
                    header: format!("{origin} {AUTHORIZATION}"),
                    cause:
                        "the token of the Hub (HF_TOKEN) has a character that no header may have"
                            .to_owned(),
                })?;
                value.set_sensitive(true);
                all.0.push((origin, AUTHORIZATION, value));
            }
        }
        Ok(all)
    }

    /// The headers of requests to the server of `url`.
    pub(super) fn of(&self, url: &Url) -> HeaderMap {
        let origin = url.origin().ascii_serialization();
        let mut headers = HeaderMap::new();
        for (server, name, value) in &self.0 {
            if *server == origin {
                headers.append(name, value.clone());
            }
        }
        headers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<HttpHeader, String> {
        text.parse()
    }

    #[test]
    fn http_header_names_a_server_and_a_variable() {
        let header = parsed("https://Data.org:443 Authorization: Bearer ${COFFEY_T}").unwrap();
        assert_eq!(header.origin, "https://data.org");
        let value = header
            .fill(|name| (name == "COFFEY_T").then(|| "abc".to_owned()))
            .unwrap();
        assert_eq!(value.to_str().unwrap(), "Bearer abc");
        assert!(!format!("{value:?}").contains("abc"));
        assert!(
            header
                .fill(|_| None)
                .unwrap_err()
                .contains("COFFEY_T is not set")
        );
        for (text, words) in [
            (
                "https://h Authorization: Bearer s3cret",
                "environment variable",
            ),
            (
                "https://h Authorization: Bearer ${T}s3cret",
                "beside the variable",
            ),
            (
                "https://h Authorization: s3cret ${T}",
                "beside the variable",
            ),
            ("https://h Authorization: Bearer${T}", "beside the variable"),
            ("https://h A: ${T}s3cret${T}", "beside the variable"),
            ("https://h", "has no header"),
            ("h Authorization: ${T}", "begin with a server"),
            ("https://h/path Authorization: ${T}", "begin with a server"),
            ("https://u:p@h Authorization: ${T}", "begin with a server"),
            ("https://h Authorization ${T}", "no ':'"),
            ("https://h Author ization: ${T}", "valid name"),
            ("https://h Authorization: ${T", "without a '}'"),
            ("https://h Range: ${T}", "sets itself"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(
                error.contains(words) && !error.contains("s3cret"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn http_header_may_have_a_scheme_before_its_variables() {
        for value in ["${T}", "token ${T}", "Basic ${T}", "${A} ${B}"] {
            assert!(parsed(&format!("https://h A: {value}")).is_ok(), "{value}");
        }
    }

    #[test]
    fn headers_go_to_their_server_alone() {
        let hub = HubOptions {
            endpoint: Ok("https://hub.org/mirror".to_owned()),
            token: Some("hf_s3cret".to_owned()),
        };
        let headers = ServerHeaders::new(&[], &hub).unwrap();
        assert!(!format!("{hub:?} {headers:?}").contains("s3cret"));
        let of = |url: &str| headers.of(&Url::parse(url).unwrap());
        assert_eq!(of("https://hub.org/x")[AUTHORIZATION], "Bearer hf_s3cret");
        for other in [
            "http://hub.org/x",
            "https://hub.org:444/x",
            "https://cdn.hub.org/x",
            "https://hub.org.evil/x",
        ] {
            assert!(of(other).is_empty(), "{other}");
        }
        let missing = parsed("https://h A: ${COFFEY_NO_SUCH_VARIABLE}").unwrap();
        let error = ServerHeaders::new(&[missing], &hub).unwrap_err();
        assert!(error.is_config() && error.to_string().contains("COFFEY_NO_SUCH_VARIABLE"));
    }
}
