//! Text for people: URLs without passwords and signatures, and characters that no terminal may interpret.

use std::borrow::Cow;
use std::fmt::Write as _;

const REDACTED: &str = "REDACTED";

/// Shortest value of a parameter that is removed from a server's answer. Bytes.
const SHORTEST_SECRET: usize = 6;

/// Schemes whose URLs have no query: a `?` is part of the name.
const WITHOUT_QUERY: [&str; 4] = ["s3", "gs", "hf", "file"];

/// `url` without its user, password and query.
#[must_use]
pub fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let rest = match user_end(rest) {
        Some(end) => format!("{REDACTED}{}", &rest[end..]),
        None => rest.to_owned(),
    };
    let has_query = !WITHOUT_QUERY.contains(&scheme.to_ascii_lowercase().as_str());
    match rest.split_once('?').filter(|_| has_query) {
        Some((plain, _)) => format!("{scheme}://{plain}?{REDACTED}"),
        None => format!("{scheme}://{rest}"),
    }
}

/// Index of the `@` after user and password in a URL without its scheme.
pub(crate) fn user_end(rest: &str) -> Option<usize> {
    let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    if let Some(at) = rest[..authority].rfind('@') {
        return Some(at);
    }
    // A password with an unescaped `/`, `?` or `#` ends the authority early, and its start is read as a port.
    let (_, port) = rest[..authority].rsplit_once(':')?;
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit()) || port.contains(']');
    if is_port { None } else { rest.rfind('@') }
}

/// `text` without the user, the password and the query of `url`, which a server may repeat in its answer.
pub(crate) fn remove_secrets_of(url: &str, text: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let user = user_end(rest).map_or("", |end| &rest[..end]);
    let query = rest.split_once('?').map_or("", |(_, query)| query);
    let values = query
        .split('&')
        .filter_map(|parameter| parameter.split_once('='));
    let password = user.split_once(':').map_or("", |(_, password)| password);
    let values = values.map(|(_, value)| value).chain([password]);
    // A short value is part of other words.
    let values = values.filter(|value| value.len() >= SHORTEST_SECRET);
    [query, user]
        .into_iter()
        .filter(|secret| !secret.is_empty())
        .chain(values)
        .fold(text.to_owned(), |text, secret| {
            text.replace(secret, REDACTED)
        })
}

/// `text` with every URL in it [redacted](redact_url).
#[must_use]
pub fn redact_urls(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let is_end = |c: char| c.is_whitespace() || c.is_control() || "\"'`<>".contains(c);
    let mut redacted = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(separator) = rest.find("://") {
        let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        let start = rest[..separator].trim_end_matches(is_scheme).len();
        let tail = &rest[separator..];
        let end = separator + tail.find(is_end).unwrap_or(tail.len());
        // Punctuation of the sentence around the URL.
        let url = rest[start..end].trim_end_matches([')', ']', '}', ',', ';', ':', '.', '\\']);
        redacted.push_str(&rest[..start]);
        redacted.push_str(&redact_url(url));
        rest = &rest[start + url.len()..];
        // A scheme alone.
        if let Some(after) = rest.strip_prefix("://") {
            redacted.push_str("://");
            rest = after;
        }
    }
    redacted.push_str(rest);
    Cow::Owned(redacted)
}

/// Whether a terminal may interpret `c`: control characters, and those that change the direction of text.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, keep: impl Fn(char) -> bool) -> Cow<'_, str> {
    let is_escaped = |c: char| is_unprintable(c) && !keep(c);
    if !text.contains(is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_escaped(c) {
            // The form of JSON and TOML, which stay valid.
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// A name or caption from a shard or a server as one line: control characters and newlines are escaped as `\u001b`.
#[must_use]
pub fn escaped(text: &str) -> Cow<'_, str> {
    escape(text, |_| false)
}

/// A whole message: as [`escaped`], but with its own newlines and tabs, and with every URL redacted.
#[must_use]
pub fn message(text: &str) -> String {
    escape(&redact_urls(text), |c| c == '\n' || c == '\t').into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_is_redacted() {
        for (url, shown) in [
            ("https://h/a.tar?sig=x/@y", "https://h/a.tar?REDACTED"),
            ("http://u:p@h:8/a@b.tar", "http://REDACTED@h:8/a@b.tar"),
            ("http://u:p/w@h/a.tar", "http://REDACTED@h/a.tar"),
            (
                "http://u:p?w#@h/a.tar?x",
                "http://REDACTED@h/a.tar?REDACTED",
            ),
            ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
            ("http://[::1]/a@b", "http://[::1]/a@b"),
            ("socks5://u:p@h", "socks5://REDACTED@h"),
            ("s3://b/a?c@d.tar", "s3://b/a?c@d.tar"),
            ("s3://key:secret@b/a", "s3://REDACTED@b/a"),
            ("/data/a?b@c.tar", "/data/a?b@c.tar"),
        ] {
            assert_eq!(redact_url(url), shown);
            assert_eq!(redact_url(shown), shown);
            assert_eq!(redact_urls(url), shown);
        }
    }

    #[test]
    fn urls_in_a_message_are_redacted() {
        for (text, shown) in [
            (
                "GET (http://u:p@h/a?k=v): \"https://x/y?z\", then http://h:80/b; end",
                "GET (http://REDACTED@h/a?REDACTED): \"https://x/y?REDACTED\", then http://h:80/b; end",
            ),
            ("as http(s)://: or ://x", "as http(s)://: or ://x"),
            ("http:// https://", "http:// https://"),
            (
                "redirect=http://h/?to=https://u:p@h",
                "redirect=http://h/?REDACTED",
            ),
            ("none: a?b@c", "none: a?b@c"),
        ] {
            assert_eq!(redact_urls(text), shown);
        }
    }

    #[test]
    fn answer_repeats_no_secret() {
        let url = "http://me:s3cret@h/a?X-Amz-Signature=0123abc&v=1";
        for (text, shown) in [
            ("no /a?X-Amz-Signature=0123abc&v=1", "no /a?REDACTED"),
            (
                "bad signature 0123abc of v 1",
                "bad signature REDACTED of v 1",
            ),
            ("me:s3cret, s3cret", "REDACTED, REDACTED"),
        ] {
            assert_eq!(remove_secrets_of(url, text), shown);
        }
        assert_eq!(remove_secrets_of("http://h/a", "http://h/a"), "http://h/a");
    }

    #[test]
    fn unprintable_characters_are_escaped() {
        assert_eq!(
            escaped("a\u{1b}[2J\n\u{9b}é\u{202e}"),
            "a\\u001b[2J\\u000a\\u009bé\\u202e"
        );
        assert_eq!(
            message("a\n\tb\r\u{7f}\u{2066}"),
            "a\n\tb\\u000d\\u007f\\u2066"
        );
        assert!(matches!(escaped("plain – ü 🦀"), Cow::Borrowed(_)));
    }
}
