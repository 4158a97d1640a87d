//! URLs and patterns for messages: without passwords, signatures and the options of `pipe:` commands.

use super::expand::split;

const REDACTED: &str = "REDACTED";

/// `data.shards` for a message: each pattern without its query, its password and the options of its command.
#[must_use]
pub fn redact_patterns(patterns: &[String]) -> String {
    let parts = patterns.iter().map(|pattern| {
        let urls = split(pattern).into_iter().map(|url| redact(url.trim()));
        urls.collect::<Vec<_>>().join("::")
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// One URL or pattern for a message.
pub(super) fn redact(text: &str) -> String {
    let Some(command) = text.strip_prefix("pipe:") else {
        return redact_url(text);
    };
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let url = words
        .map(|word| word.trim_matches(['\'', '"']))
        .find(|word| is_remote(word));
    match url {
        // An assignment in front of a command may hold a secret.
        _ if program.contains('=') => "pipe:…".to_owned(),
        Some(url) => format!("pipe:{program} … {}", redact_url(url)),
        None => format!("pipe:{program} …"),
    }
}

fn is_remote(word: &str) -> bool {
    ["s3://", "gs://", "http://", "https://"]
        .iter()
        .any(|scheme| word.starts_with(scheme))
}

fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url
        .split_once("://")
        .filter(|(scheme, _)| ["http", "https"].contains(scheme))
    else {
        return url.to_owned();
    };
    let (plain, query) = match rest.split_once('?') {
        Some((plain, _)) => (plain, format!("?{REDACTED}")),
        None => (rest, String::new()),
    };
    let host_end = plain.find('/').unwrap_or(plain.len());
    let plain = match plain[..host_end].rfind('@') {
        Some(at) => format!("{REDACTED}{}", &plain[at..]),
        None => plain.to_owned(),
    };
    format!("{scheme}://{plain}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redact_hides_passwords_signatures_and_options() {
        for (text, shown) in [
            ("https://h/a.tar?sig=x/@y", "https://h/a.tar?REDACTED"),
            (
                "https://user:pw@h:8/a@b.tar",
                "https://REDACTED@h:8/a@b.tar",
            ),
            ("s3://b/a?c@d.tar", "s3://b/a?c@d.tar"),
            ("/data/a.tar", "/data/a.tar"),
            (
                "pipe:curl -H 'Authorization: Bearer t' 'https://h/a.tar?k'",
                "pipe:curl … https://h/a.tar?REDACTED",
            ),
            ("pipe:TOKEN=t curl x", "pipe:…"),
            ("pipe:cat x", "pipe:cat …"),
            ("", ""),
        ] {
            assert_eq!(redact(text), shown);
        }
        let patterns = ["a.tar::https://h/b?c".to_owned(), "c.tar".to_owned()];
        assert_eq!(
            redact_patterns(&patterns),
            "a.tar::https://h/b?REDACTED, c.tar"
        );
    }
}
