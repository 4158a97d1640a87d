//! Patterns of shards for people: without passwords, signatures and the options of `pipe:` commands.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

use super::expand::split;
use crate::text::{escaped, redact_url};

/// An entry of `data.shards`: URLs with braces, joined by `::`. `Display`, `Debug` and `Serialize` show it without secrets.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ShardPattern(String);

impl ShardPattern {
    /// The whole pattern, for the look-up of its shards.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl<T: Into<String>> From<T> for ShardPattern {
    fn from(pattern: T) -> Self {
        Self(pattern.into())
    }
}

impl fmt::Display for ShardPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, url) in split(&self.0).into_iter().enumerate() {
            let separator = if index == 0 { "" } else { "::" };
            write!(f, "{separator}{}", escaped(&redact(url.trim())))?;
        }
        Ok(())
    }
}

impl fmt::Debug for ShardPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string(), f)
    }
}

impl Serialize for ShardPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
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
        _ if program.contains('=') || program == "…" => "pipe:…".to_owned(),
        Some(url) => format!("pipe:{program} … {}", redact_url(url)),
        None => format!("pipe:{program} …"),
    }
}

fn is_remote(word: &str) -> bool {
    ["s3://", "gs://", "http://", "https://"]
        .iter()
        .any(|scheme| word.starts_with(scheme))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_pattern_shows_no_secret() {
        for (text, shown) in [
            ("https://h/a.tar?sig=x/@y", "https://h/a.tar?REDACTED"),
            (
                "https://user:pw@h:8/{0..1}.tar",
                "https://REDACTED@h:8/{0..1}.tar",
            ),
            ("s3://b/a?c@d.tar", "s3://b/a?c@d.tar"),
            ("/data/a.tar", "/data/a.tar"),
            (
                "pipe:curl -H 'Authorization: Bearer t' 'https://h/a.tar?k'",
                "pipe:curl … https://h/a.tar?REDACTED",
            ),
            ("pipe:TOKEN=t curl x", "pipe:…"),
            ("pipe:cat x", "pipe:cat …"),
            ("a.tar::https://h/b?c", "a.tar::https://h/b?REDACTED"),
            ("", ""),
        ] {
            let pattern = ShardPattern::from(text);
            assert_eq!(pattern.to_string(), shown);
            assert_eq!(ShardPattern::from(shown).to_string(), shown);
            assert_eq!(format!("{pattern:?}"), format!("{shown:?}"));
            assert_eq!(pattern.expose(), text);
        }
    }
}
