//! Text for people: URLs without passwords and signatures, and characters that no terminal may interpret.

use std::borrow::Cow;
use std::fmt::Write as _;

const REDACTED: &str = "REDACTED";

/// Shortest value of a parameter that is removed from a server's answer. Bytes.
const SHORTEST_SECRET: usize = 6;

/// Longest value of a key and longest URL in a message. Characters.
const LONGEST_VALUE: usize = 200;

/// Schemes of the header `Authorization`.
const AUTH_SCHEMES: [&str; 8] = [
    "ApiKey",
    "Basic",
    "Bearer",
    "Digest",
    "Key",
    "Negotiate",
    "OAuth",
    "Token",
];

/// Schemes whose URLs have no query: a `?` is part of the name, unless `name=value` follows.
const WITHOUT_QUERY: [&str; 4] = ["s3", "gs", "hf", "file"];

/// `url` without its user, password and query, also where the URL is malformed, as `http:/user:password@host`.
#[must_use]
pub fn redact_url(url: &str) -> String {
    let (prefix, rest) = url.split_at(prefix_length(url));
    let user = match prefix {
        "" => bare_user_end(rest),
        _ => user_end(rest),
    };
    let rest = match user {
        Some(end) => format!("{REDACTED}{}", &rest[end..]),
        None => rest.to_owned(),
    };
    let scheme = prefix.trim_end_matches([':', '/']).to_ascii_lowercase();
    let has_query = !scheme.is_empty() && !WITHOUT_QUERY.contains(&scheme.as_str());
    let query = rest
        .match_indices('?')
        .map(|(at, _)| at)
        .find(|at| has_query || is_parameter(&rest[at + 1..]));
    match query {
        Some(at) => format!("{prefix}{}?{REDACTED}", &rest[..at]),
        None => format!("{prefix}{rest}"),
    }
}

/// Length of the scheme and the slashes after it, also where one of `://` is left out; 0 for a path.
fn prefix_length(url: &str) -> usize {
    let name = url.find(|c| !is_of_scheme(c)).unwrap_or(url.len());
    let (scheme, after) = url.split_at(name);
    let colon = usize::from(after.starts_with(':'));
    let slashes = after[colon..]
        .bytes()
        .take_while(|byte| *byte == b'/')
        .count();
    let is_http = ["http", "https"].contains(&scheme.to_ascii_lowercase().as_str());
    match scheme {
        "" if colon == 0 && slashes >= 2 => slashes,
        "" => 0,
        // The third slash begins the path.
        "file" if colon == 1 && slashes > 0 => name + 1 + slashes.min(2),
        _ if colon == 1 && (slashes > 0 || is_http) => name + 1 + slashes,
        _ if is_http && slashes >= 2 => name + slashes,
        _ => 0,
    }
}

fn is_of_scheme(c: char) -> bool {
    c.is_ascii_alphanumeric() || "+-.".contains(c)
}

/// Index of the `@` after `user:password` at the start of a text without a scheme.
fn bare_user_end(text: &str) -> Option<usize> {
    let authority = text.split(['/', '?', '#']).next()?;
    let at = authority.rfind('@')?;
    authority[..at].contains(':').then_some(at)
}

/// Whether a query begins with `name=value`.
fn is_parameter(query: &str) -> bool {
    query.split_once('=').is_some_and(|(name, value)| {
        !name.is_empty() && !name.contains(['/', '?']) && !value.is_empty()
    })
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

/// `text` without the values of the headers that were sent, which a server may repeat in its answer.
pub(crate) fn remove_values<'a>(values: impl IntoIterator<Item = &'a str>, text: &str) -> String {
    let mut secrets = Vec::new();
    for value in values {
        secrets.push(value);
        let words = value.split(|c: char| c.is_whitespace() || ",;".contains(c));
        for word in words.filter(|word| !is_auth_scheme(word)) {
            let inner = word.split_once('=').map_or("", |(_, inner)| inner);
            let parts = [word, inner.trim_matches(['"', '='])];
            secrets.extend(parts.iter().filter(|part| part.len() >= SHORTEST_SECRET));
        }
    }
    secrets.retain(|secret| !secret.is_empty());
    // A secret may be a part of a longer one.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets.into_iter().fold(text.to_owned(), |text, secret| {
        text.replace(secret, REDACTED)
    })
}

/// Whether `word` is a scheme of the header `Authorization`, which is no secret.
pub(crate) fn is_auth_scheme(word: &str) -> bool {
    AUTH_SCHEMES
        .iter()
        .any(|scheme| scheme.eq_ignore_ascii_case(word))
}

/// `text` with every URL in it [redacted](redact_url).
#[must_use]
pub fn redact_urls(text: &str) -> Cow<'_, str> {
    if !text.contains("://") && !text.contains(['@', '?']) {
        return Cow::Borrowed(text);
    }
    let is_end = |c: char| c.is_whitespace() || c.is_control() || "\"'`<>".contains(c);
    let mut redacted = String::with_capacity(text.len());
    for word in text.split_inclusive(is_end) {
        let mut start = 0;
        for end in ends_of_urls(word) {
            redact_word(&word[start..end], &mut redacted);
            start = end;
        }
    }
    Cow::Owned(redacted)
}

/// Ends of the URLs in a word that joins several with `::`, `,`, `;` or `|`.
fn ends_of_urls(word: &str) -> Vec<usize> {
    let begins_url = |text: &str| {
        text.trim_start_matches(is_of_scheme).starts_with("://") && !text.starts_with("://")
    };
    let mut is_address = false;
    let mut ends = Vec::new();
    for (at, c) in word.char_indices() {
        let after = &word[at + c.len_utf8()..];
        match c {
            '[' => is_address = true,
            ']' => is_address = false,
            ':' if !is_address && after.starts_with(':') => ends.push(at + 2),
            ',' | ';' | '|' if begins_url(after) => ends.push(at + 1),
            _ => {}
        }
    }
    ends.push(word.len());
    ends
}

/// Appends `word` with the URL in it redacted, between the punctuation of the sentence and the key of `key=URL`.
fn redact_word(word: &str, into: &mut String) {
    let is_key = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let scheme = word
        .find("://")
        .map(|separator| word[..separator].trim_end_matches(is_of_scheme).len())
        // The URL in the query of another one.
        .filter(|start| !word[..*start].contains(['@', '?']));
    let start = scheme.unwrap_or_else(|| {
        let key = word.trim_start_matches(['(', '[', '{']);
        let value = key.trim_start_matches(is_key).strip_prefix('=');
        word.len() - value.unwrap_or(key).len()
    });
    let (before, rest) = word.split_at(start);
    let is_after = |c: char| c.is_whitespace() || c.is_control() || "\"'`<>)]},;:.\\|".contains(c);
    let url = rest.trim_end_matches(is_after);
    into.push_str(before);
    into.push_str(&redact_url(url));
    into.push_str(&rest[url.len()..]);
}

/// `text` up to the longest value in a message.
#[must_use]
pub fn cut(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(LONGEST_VALUE) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => Cow::Borrowed(text),
    }
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
            ("http:/u:p@h/x.tar?X=s", "http:/REDACTED@h/x.tar?REDACTED"),
            ("http:///u:p@h/x.tar", "http:///REDACTED@h/x.tar"),
            ("https:u:p@h/x.tar?X=s", "https:REDACTED@h/x.tar?REDACTED"),
            ("https//u:p@h/x", "https//REDACTED@h/x"),
            ("//u:p@h/x?X=s", "//REDACTED@h/x?REDACTED"),
            ("u:p@h/x?X=s", "REDACTED@h/x?REDACTED"),
            ("{.tar?X-Amz-Signature=s", "{.tar?REDACTED"),
            ("gs://b/x.tar?X-Goog-Signature=s", "gs://b/x.tar?REDACTED"),
            ("s3://b/x?y?X-Amz-Signature=s", "s3://b/x?y?REDACTED"),
            ("hf://d/u/n/x?token=s", "hf://d/u/n/x?REDACTED"),
            ("file:///x?a=s", "file:///x?REDACTED"),
            ("file:///a:b@c/x", "file:///a:b@c/x"),
            ("/data/a@b:c.tar", "/data/a@b:c.tar"),
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
            (
                "-s s3.endpoint_url=u:p@x: wrong (u:p@h/a?b=c).",
                "-s s3.endpoint_url=REDACTED@x: wrong (REDACTED@h/a?REDACTED).",
            ),
            (
                "s3://b/a.tar::http://u:p@h/x?y,https://u:p@i/z",
                "s3://b/a.tar::http://REDACTED@h/x?REDACTED,https://REDACTED@i/z",
            ),
            ("https:u:p@h/x?next=http://h", "https:REDACTED@h/x?REDACTED"),
            ("x.toml:3:5: a@b: why?", "x.toml:3:5: a@b: why?"),
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
    fn answer_repeats_no_header() {
        for (value, text, shown) in [
            ("Bearer s3cret1", "no 'Bearer s3cret1'", "no 'REDACTED'"),
            (
                "Bearer s3cret1",
                "no Bearer: s3cret1",
                "no Bearer: REDACTED",
            ),
            ("Basic dXNlcjpw==", "dXNlcjpw==", "REDACTED"),
            (
                "a=s3cret1; b=s3cret2",
                "s3cret2, s3cret1",
                "REDACTED, REDACTED",
            ),
            ("", "as it is", "as it is"),
        ] {
            assert_eq!(remove_values([value], text), shown);
        }
    }

    #[test]
    fn long_value_is_cut() {
        assert_eq!(cut("é"), "é");
        let long = "é".repeat(1000);
        assert_eq!(cut(&long), format!("{}…", "é".repeat(LONGEST_VALUE)));
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
