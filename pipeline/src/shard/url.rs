//! Where shards are: URL syntax and brace expansion. Purely text; nothing is looked up here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// More shards than any data set has: a pattern beyond this is a slip, not a wish.
const MAX_EXPANSION: usize = if cfg!(any(test, feature = "fuzzing")) {
    // A fuzzer would do nothing else than expand.
    10_000
} else {
    10_000_000
};

/// What is wrong with a shard URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not something that can name a shard.
    #[error("shard URL {url:?}: {reason}")]
    Invalid {
        /// As it was given.
        url: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// Nothing was given.
    #[error("no shard URL was given")]
    Empty,
}

fn invalid(url: &str, reason: impl Into<String>) -> UrlError {
    UrlError::Invalid {
        url: url.to_owned(),
        reason: reason.into(),
    }
}

fn too_many(pattern: &str) -> UrlError {
    invalid(
        pattern,
        format!("stands for more than {MAX_EXPANSION} shards"),
    )
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Location {
    S3 { bucket: String, key: String },
    Http(String),
    File(PathBuf),
}

/// The place of one shard, or, ending in `/`, of a folder of shards.
///
/// `s3://bucket/key.tar`, `http://…`, `https://…`, `file:///path` and plain paths; also the form
/// older webdataset scripts use, `pipe:aws s3 cp s3://bucket/key.tar -`, whose URL is read out of
/// the command. The command itself is never run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ShardUrl(Location);

impl ShardUrl {
    /// An object in S3.
    pub(crate) fn s3(bucket: &str, key: &str) -> Self {
        Self(Location::S3 {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
        })
    }

    /// A local file.
    #[must_use]
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Location::File(path.into()))
    }

    pub(crate) fn location(&self) -> &Location {
        &self.0
    }

    /// Whether this names a folder to be listed, not a shard.
    #[must_use]
    pub fn is_folder(&self) -> bool {
        match &self.0 {
            Location::S3 { key, .. } => key.is_empty() || key.ends_with('/'),
            Location::Http(url) => url.ends_with('/'),
            Location::File(path) => path.as_os_str().to_string_lossy().ends_with('/'),
        }
    }

    /// The URL for messages: without the query, where signed URLs carry their secret.
    #[must_use]
    pub fn redacted(&self) -> String {
        match &self.0 {
            Location::Http(url) => match url.split_once('?') {
                Some((plain, _)) => format!("{plain}?REDACTED"),
                None => url.clone(),
            },
            Location::S3 { .. } | Location::File(_) => self.to_string(),
        }
    }

    /// The shard's file name, as `00000.tar`.
    #[must_use]
    pub fn name(&self) -> String {
        let whole = match &self.0 {
            Location::S3 { key, .. } => key.as_str().into(),
            Location::Http(url) => url.split(['?', '#']).next().unwrap_or_default().into(),
            Location::File(path) => path.to_string_lossy(),
        };
        let trimmed = whole.trim_end_matches('/');
        trimmed.rsplit('/').next().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for ShardUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Location::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Location::Http(url) => f.write_str(url),
            Location::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl From<ShardUrl> for String {
    fn from(url: ShardUrl) -> Self {
        url.to_string()
    }
}

impl TryFrom<String> for ShardUrl {
    type Error = UrlError;

    fn try_from(url: String) -> Result<Self, UrlError> {
        url.parse()
    }
}

impl FromStr for ShardUrl {
    type Err = UrlError;

    /// Reads one URL. Braces are taken as they are: see [`expand`].
    fn from_str(text: &str) -> Result<Self, UrlError> {
        let url = unwrap_pipe(text.trim())?;
        if url.is_empty() {
            return Err(UrlError::Empty);
        }
        if let Some(rest) = url.strip_prefix("s3://") {
            let Some((bucket, key)) = rest.split_once('/') else {
                return Err(invalid(
                    url,
                    "names a bucket but no object; give s3://bucket/key.tar, or end it with '/' to take every .tar under it",
                ));
            };
            if bucket.is_empty() {
                return Err(invalid(
                    url,
                    "has no bucket; the form is s3://bucket/key.tar",
                ));
            }
            return Ok(Self::s3(bucket, key));
        }
        if let Some(rest) = url
            .strip_prefix("http://")
            .or_else(|| url.strip_prefix("https://"))
        {
            if rest.is_empty() || rest.starts_with('/') {
                return Err(invalid(url, "has no host"));
            }
            return Ok(Self(Location::Http(url.to_owned())));
        }
        if let Some(rest) = url.strip_prefix("file://") {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            // A host, or something that would be another URL when written without its scheme.
            if !path.starts_with('/') {
                return Err(invalid(
                    url,
                    "has no absolute path; the form is file:///path/to/shard.tar",
                ));
            }
            return Ok(Self::file(Path::new(path)));
        }
        if let Some((scheme, _)) = url.split_once("://") {
            return Err(invalid(
                url,
                format!(
                    "unknown scheme {scheme:?}; known are s3://, http://, https://, file:// and plain paths"
                ),
            ));
        }
        Ok(Self::file(url))
    }
}

/// Reads the URL out of `pipe:aws s3 cp URL -` and its like.
fn unwrap_pipe(url: &str) -> Result<&str, UrlError> {
    let Some(command) = url.strip_prefix("pipe:") else {
        return Ok(url);
    };
    command
        .split_whitespace()
        .map(|word| word.trim_matches(['\'', '"']))
        .find(|word| ["s3://", "http://", "https://"].iter().any(|scheme| word.starts_with(scheme)))
        .ok_or_else(|| {
            invalid(
                url,
                "commands are not run; a s3:// or http(s):// URL is read out of them, and this one has none",
            )
        })
}

/// Expands braces in every pattern and reads the URLs, in order.
///
/// `{00000..01210}` counts (keeping the zeros), `{a,b}` lists; both nest and repeat, as in a shell.
///
/// # Errors
/// [`UrlError`] for braces that don't match, for what isn't a URL, and when nothing is given.
pub fn expand(patterns: &[String]) -> Result<Vec<ShardUrl>, UrlError> {
    let mut urls = Vec::new();
    for pattern in patterns {
        let pattern = unwrap_pipe(pattern.trim())?;
        for url in expand_braces(pattern)? {
            urls.push(url.parse()?);
        }
    }
    if urls.is_empty() {
        return Err(UrlError::Empty);
    }
    Ok(urls)
}

fn expand_braces(pattern: &str) -> Result<Vec<String>, UrlError> {
    let Some(open) = pattern.find('{') else {
        if pattern.contains('}') {
            return Err(invalid(pattern, "has a '}' without a '{'"));
        }
        return Ok(vec![pattern.to_owned()]);
    };
    let (before, rest) = (&pattern[..open], &pattern[open + 1..]);
    if before.contains('}') {
        return Err(invalid(pattern, "has a '}' without a '{'"));
    }
    let mut depth = 1_usize;
    let mut commas = Vec::new();
    let close = rest
        .bytes()
        .position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            depth == 0
        })
        .ok_or_else(|| invalid(pattern, "has a '{' without a '}'"))?;
    let (inside, after) = (&rest[..close], &rest[close + 1..]);
    let mut depth = 0_usize;
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => commas.push(at),
            _ => {}
        }
    }
    let middles = if commas.is_empty() {
        match sequence(pattern, inside)? {
            Some(sequence) => sequence,
            // As a shell does: braces that list nothing stand for themselves.
            None => expand_braces(inside)?
                .into_iter()
                .map(|text| format!("{{{text}}}"))
                .collect(),
        }
    } else {
        let mut parts = Vec::new();
        let mut start = 0;
        for end in commas.into_iter().chain([inside.len()]) {
            parts.extend(expand_braces(&inside[start..end])?);
            if parts.len() > MAX_EXPANSION {
                return Err(too_many(pattern));
            }
            start = end + 1;
        }
        parts
    };
    let tails = expand_braces(after)?;
    if middles.len().saturating_mul(tails.len()) > MAX_EXPANSION {
        return Err(too_many(pattern));
    }
    let mut expanded = Vec::with_capacity(middles.len() * tails.len());
    for middle in &middles {
        for tail in &tails {
            expanded.push(format!("{before}{middle}{tail}"));
        }
    }
    Ok(expanded)
}

/// `00..12` or `0..10..2`; `None` if it isn't a sequence of numbers.
fn sequence(pattern: &str, inside: &str) -> Result<Option<Vec<String>>, UrlError> {
    let mut parts = inside.split("..");
    let (Some(first), Some(last), step, None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Ok(None);
    };
    let number = |text: &str| -> Option<u64> {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    let (Some(from), Some(to)) = (number(first), number(last)) else {
        return Ok(None);
    };
    let step = match step.map(number) {
        None => 1,
        Some(Some(step)) if step > 0 => step,
        Some(_) => {
            return Err(invalid(
                pattern,
                format!("the step of {{{inside}}} must be a number above 0"),
            ));
        }
    };
    let padded = |text: &str| text.len() > 1 && text.starts_with('0');
    let width = if padded(first) || padded(last) {
        first.len().max(last.len())
    } else {
        0
    };
    if from.abs_diff(to) / step >= MAX_EXPANSION as u64 {
        return Err(too_many(pattern));
    }
    let text = |n: u64| format!("{n:0width$}");
    let step_size = usize::try_from(step).unwrap_or(usize::MAX);
    Ok(Some(if from <= to {
        (from..=to).step_by(step_size).map(text).collect()
    } else {
        (to..=from).rev().step_by(step_size).map(text).collect()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(pattern: &str) -> Vec<String> {
        let urls = expand(&[pattern.to_owned()]).unwrap();
        urls.iter().map(ToString::to_string).collect()
    }

    fn refused(pattern: &str) -> String {
        expand(&[pattern.to_owned()]).unwrap_err().to_string()
    }

    #[test]
    fn sequences_keep_their_zeros() {
        let urls = expanded("s3://bucket/data/{00000..01210}.tar");
        assert_eq!(urls.len(), 1211);
        assert_eq!(urls[0], "s3://bucket/data/00000.tar");
        assert_eq!(urls[1210], "s3://bucket/data/01210.tar");
        assert_eq!(expanded("{8..11}"), ["8", "9", "10", "11"]);
        assert_eq!(expanded("{08..11..2}"), ["08", "10"]);
        assert_eq!(expanded("{2..0}"), ["2", "1", "0"]);
        assert_eq!(expanded("{7..7}"), ["7"]);
    }

    #[test]
    fn lists_nest_and_repeat() {
        assert_eq!(expanded("x{a,b{1..2}}y"), ["xay", "xb1y", "xb2y"]);
        assert_eq!(expanded("{a,b}/{0..1}"), ["a/0", "a/1", "b/0", "b/1"]);
        assert_eq!(expanded("a{,-b}.tar"), ["a.tar", "a-b.tar"]);
        assert_eq!(expanded("{name}.tar"), ["{name}.tar"]);
    }

    #[test]
    fn the_old_pipe_form_is_understood() {
        assert_eq!(
            expanded("pipe:aws s3 cp s3://muse-datasets/laion/{0..1}.tar -"),
            [
                "s3://muse-datasets/laion/0.tar",
                "s3://muse-datasets/laion/1.tar"
            ]
        );
        assert_eq!(
            expanded("pipe:curl -s -L 'https://host/0.tar'"),
            ["https://host/0.tar"]
        );
        assert!(refused("pipe:cat /data/0.tar").contains("commands are not run"));
    }

    #[test]
    fn every_kind_of_place_is_told_apart() {
        let url: ShardUrl = "s3://bucket/a/b.tar".parse().unwrap();
        assert_eq!(
            url.location(),
            &Location::S3 {
                bucket: "bucket".into(),
                key: "a/b.tar".into()
            }
        );
        assert_eq!(url.name(), "b.tar");
        assert!(!url.is_folder());
        assert!("s3://bucket/".parse::<ShardUrl>().unwrap().is_folder());
        assert!("s3://bucket/a/".parse::<ShardUrl>().unwrap().is_folder());
        assert!("data/".parse::<ShardUrl>().unwrap().is_folder());
        assert_eq!(
            "file:///a/b.tar".parse::<ShardUrl>().unwrap(),
            ShardUrl::file("/a/b.tar")
        );
        assert_eq!(
            "https://h/a/b.tar?x=/1".parse::<ShardUrl>().unwrap().name(),
            "b.tar"
        );
    }

    #[test]
    fn messages_show_no_signature() {
        let url: ShardUrl = "https://h/a.tar?X-Amz-Signature=abc".parse().unwrap();
        assert_eq!(url.redacted(), "https://h/a.tar?REDACTED");
        assert_eq!(
            "s3://b/a?c.tar".parse::<ShardUrl>().unwrap().redacted(),
            "s3://b/a?c.tar"
        );
    }

    #[test]
    fn errors_say_what_would_be_right() {
        assert!(refused("s3://bucket").contains("s3://bucket/key.tar"));
        assert!(refused("s3:///key").contains("no bucket"));
        assert!(refused("gs://bucket/key").contains("known are s3://"));
        assert!(refused("a{0..1").contains("'{' without a '}'"));
        assert!(refused("a0..1}").contains("'}' without a '{'"));
        assert!(refused("{0..99999999999}").contains("more than"));
        assert!(refused("{0..999}{0..999}").contains("more than"));
        assert!(refused("{{0..6000},{0..6000}}").contains("more than"));
        assert!(refused("file://s3://bucket/0.tar").contains("absolute path"));
        assert!(refused("{0..9..0}").contains("step"));
        assert_eq!(expand(&[]).unwrap_err(), UrlError::Empty);
        assert_eq!(expand(&[" ".to_owned()]).unwrap_err(), UrlError::Empty);
    }

    #[test]
    fn parsing_never_panics() {
        let alphabet = [
            "{", "}", ",", "..", "0", "9", "é", "s3://", "/", "pipe:", " ", "a",
        ];
        let mut generator = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let length = generator.usize(0..9);
            let text: String = (0..length)
                .map(|_| alphabet[generator.usize(0..alphabet.len())])
                .collect();
            if let Ok(urls) = expand(std::slice::from_ref(&text)) {
                for url in urls {
                    let again: ShardUrl = url.to_string().parse().unwrap();
                    assert_eq!(again.is_folder(), url.is_folder(), "{text}");
                }
            }
        }
    }
}
