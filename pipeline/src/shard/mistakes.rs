//! Patterns that other tools expand and this one doesn't: each is refused with what to write instead. A local file whose
//! name looks like one is written `file:///…`.

use super::url::{UrlError, invalid};
use crate::text::{cut, redact_url};

/// Quote characters and separators of lists in other files.
const QUOTES: [char; 3] = ['\'', '"', '`'];
const SEPARATORS: [char; 3] = [',', ';', '|'];
/// Endings of a word that is a whole pattern.
const ENDINGS: [&str; 4] = [".tar", ".tar.gz", ".tgz", "/"];

/// Refuses a URL or pattern that can't mean what it says.
pub(super) fn refuse(text: &str) -> Result<(), UrlError> {
    if text.starts_with("file://") {
        return Ok(());
    }
    match mistake(text) {
        Some(reason) => Err(invalid(text, reason)),
        None => Ok(()),
    }
}

fn mistake(text: &str) -> Option<String> {
    if text.starts_with(QUOTES) {
        return Some("begins with a quote: leave the quotes out".to_owned());
    }
    if text.contains("://REDACTED@") || text.ends_with("?REDACTED") {
        return Some(
            "has no login and no signature, which coffey leaves out of a run's config.toml and of messages: write the whole URL"
                .to_owned(),
        );
    }
    if let Some((scheme, _)) = text.split_once(":/")
        && ["s3", "http", "https", "hf", "gs", "file"].contains(&scheme)
        && !text[scheme.len()..].starts_with("://")
    {
        return Some(format!(
            "has one '/' after {scheme}: where two belong: write {scheme}://…"
        ));
    }
    // A query is passed on as it is.
    let path = match text.starts_with("http") {
        true => text.split('?').next().unwrap_or_default(),
        false => text,
    };
    if is_several(path) {
        return Some(
            "looks like several patterns in one: write a list, [\"A\", \"B\"], or join them with two colons, A::B"
                .to_owned(),
        );
    }
    if let Some(variable) = variable(path) {
        return Some(format!(
            "{variable} is not expanded: write its value (in a shell, -s \"data.shards=…\" in double quotes lets the shell expand it)"
        ));
    }
    if path.contains('*') {
        let folder = &path[..path[..path.find('*')?]
            .rfind('/')
            .map_or(0, |slash| slash + 1)];
        return Some(if path.starts_with("http") {
            "'*' is not expanded, and folders can't be listed over HTTP: count the shards in braces, as {00000..01210}"
                .to_owned()
        } else {
            let folder = redact_url(if folder.is_empty() { "./" } else { folder });
            let folder = cut(&folder);
            format!(
                "'*' is not expanded: write {folder} for every .tar, .tar.gz and .tgz there, or count the shards in braces, as \
                 {{00000..01210}}"
            )
        });
    }
    if path.contains('?') && !path.contains("://") {
        return Some(
            "'?' is not expanded: count the shards in braces, as {00000..01210}".to_owned(),
        );
    }
    let (_, rest) = path.split_once('[')?;
    let (inside, _) = rest.split_once(']')?;
    let (from, to) = inside.split_once('-').or_else(|| inside.split_once(".."))?;
    let is_end = |end: &str| !end.is_empty() && end.bytes().all(|b| b.is_ascii_alphanumeric());
    (is_end(from) && is_end(to)).then(|| {
        format!("[{inside}] is not expanded: count in braces with two dots, as {{{from}..{to}}}")
    })
}

/// Whether the text is several patterns with a separator between them.
fn is_several(text: &str) -> bool {
    let scheme_follows = |rest: &str| {
        let rest = rest.trim_start().trim_start_matches(QUOTES);
        [
            "s3://", "http://", "https://", "hf://", "gs://", "file://", "pipe:",
        ]
        .iter()
        .any(|scheme| rest.starts_with(scheme))
    };
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ if depth > 0 => {}
            _ if !c.is_whitespace() && !SEPARATORS.contains(&c) => {}
            _ if scheme_follows(&text[at + c.len_utf8()..]) => return true,
            _ => {}
        }
    }
    let between = |c: char| c.is_whitespace() || SEPARATORS.contains(&c);
    let words: Vec<_> = text
        .split(between)
        .filter(|word| !word.is_empty())
        .collect();
    let is_pattern = |word: &&str| ENDINGS.iter().any(|ending| word.ends_with(ending));
    words.len() > 1 && words.iter().all(is_pattern)
}

/// The first variable of a shell, as `$HOME`, `${HOME}` or `$(…)`.
fn variable(text: &str) -> Option<&str> {
    let start = text.match_indices('$').map(|(at, _)| at).find(|at| {
        text[at + 1..].starts_with(|c: char| c.is_ascii_alphabetic() || "_{(".contains(c))
    })?;
    let rest = &text[start + 1..];
    let length = match rest.as_bytes().first()? {
        b'{' => rest.find('}').map_or(rest.len(), |end| end + 1),
        b'(' => rest.find(')').map_or(rest.len(), |end| end + 1),
        _ => rest
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(rest.len()),
    };
    Some(&text[start..start + 1 + length])
}

/// The fault of braces that list nothing; `None` where they are text.
pub(super) fn braces(inside: &str) -> Option<String> {
    let digits = |c: char| c.is_ascii_digit();
    let first = inside.trim().split(|c| !digits(c)).next()?;
    let last = inside.trim().rsplit(|c| !digits(c)).next()?;
    let between = inside.trim().strip_prefix(first)?.strip_suffix(last)?;
    if between.is_empty() || between.chars().any(char::is_alphanumeric) {
        return None;
    }
    if first.is_empty() || last.is_empty() {
        let open = between.contains("..") && !(first.is_empty() && last.is_empty());
        return open
            .then(|| format!("{{{inside}}} has only one end: write both, as {{00000..01210}}"));
    }
    Some(format!(
        "{{{inside}}} counts nothing: write {{{first}..{last}}}, with two dots and no spaces"
    ))
}

/// The reason for a scheme that is not known.
pub(super) fn unknown_scheme(scheme: &str, rest: &str) -> String {
    let shown = redact_url(&format!("{scheme}://{rest}"));
    let shown = shown.split_once("://").map_or("", |(_, rest)| rest);
    let rest = &*cut(shown);
    let scheme = &*cut(scheme);
    let hint = match scheme.to_ascii_lowercase().as_str() {
        "gs" | "gcs" => format!(
            "; a bucket of Google's is read as s3://{rest} with [s3] endpoint_url = \"https://storage.googleapis.com\" and an HMAC \
             key, or, if it is public, as https://storage.googleapis.com/{rest}"
        ),
        "s3a" | "s3n" | "r2" | "minio" | "oss" => {
            format!("; write s3://{rest}, with [s3] endpoint_url for another server than AWS")
        }
        "az" | "abfs" | "abfss" | "wasb" | "wasbs" => {
            "; a blob of Azure's is read by its https:// URL, signed if it is private".to_owned()
        }
        lower @ ("s3" | "http" | "https" | "hf" | "file") if lower != scheme => {
            format!("; write {lower}://{rest}")
        }
        _ => String::new(),
    };
    format!(
        "unknown scheme {scheme:?}; known are s3://, http://, https://, hf://, file://, plain paths and - for standard \
         input{hint}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        refuse(text).unwrap_err().to_string()
    }

    #[test]
    fn mistake_of_several_patterns_in_one_names_both_forms() {
        for text in [
            "s3://b/{0..1}.tar s3://c/{0..1}.tar",
            "a/{0..1}.tar b/{0..1}.tar",
            "a.tar\nb.tgz",
            "a/ b/",
            "s3://b/0.tar,s3://b/1.tar",
            "https://h/0.tar; https://h/1.tar",
            "a.tar, b.tar",
            "a.tar,b.tar",
        ] {
            assert!(refused(text).contains("A::B"), "{text}");
        }
        for text in [
            "/data/my shards/0.tar",
            "s3://b/my shards/{0..1}.tar",
            "a b.tar",
            "s3://b/{0.tar,1.tar}",
            "https://h/x?next= https://h/y",
            "file:///a.tar b.tar",
        ] {
            assert_eq!(refuse(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn mistake_of_globs_names_the_folder() {
        assert!(refused("s3://b/p/*.tar").contains("write s3://b/p/ for every .tar"));
        assert!(refused("/data/**/a.tar").contains("write /data/ for every .tar"));
        assert!(refused("*.tar").contains("write ./ for every .tar"));
        assert!(refused("https://h/*.tar").contains("{00000..01210}"));
        assert!(refused("a/[0-9].tar").contains("{0..9}"));
        assert!(refused("a/[00000-00003].tar").contains("{00000..00003}"));
        assert_eq!(refuse("http://[::1]:80/a.tar"), Ok(()));
        assert_eq!(refuse("https://h/a.tar?x=*"), Ok(()));
        assert_eq!(refuse("file:///data/*.tar"), Ok(()));
        assert!(refused("a/0000?.tar").contains("'?' is not expanded"));
        assert_eq!(refuse("https://h/a.tar?sig=1"), Ok(()));
    }

    #[test]
    fn mistake_of_variables_names_the_variable() {
        assert!(refused("$HOME/a.tar").contains("$HOME is not expanded"));
        assert!(refused("s3://${BUCKET}/{0..1}.tar").contains("${BUCKET} is not expanded"));
        assert!(refused("$(pwd)/a.tar").contains("$(pwd) is not expanded"));
        assert_eq!(refuse("a$1.tar"), Ok(()));
        assert_eq!(refuse("https://h/a?$top=1"), Ok(()));
    }

    #[test]
    fn mistake_in_braces_names_the_two_dots() {
        for inside in [
            "00000-00003",
            "00000...00003",
            "00000:00003",
            "00000 .. 00003",
            "00000 - 00003",
            "00000–00003",
        ] {
            assert!(
                braces(inside).unwrap().contains("{00000..00003}"),
                "{inside}"
            );
        }
        assert!(braces("00000..").unwrap().contains("only one end"));
        assert!(braces("..3").unwrap().contains("only one end"));
        for inside in ["name", "", "7", "a-b", "a..10", "10a-b10", "..", "-"] {
            assert_eq!(braces(inside), None, "{inside}");
        }
    }

    #[test]
    fn mistake_in_the_scheme_names_the_right_one() {
        assert!(refused("s3:/b/0.tar").contains("s3://"));
        assert!(refused("'s3://b/0.tar'").contains("quotes"));
        let scheme = |scheme, rest| unknown_scheme(scheme, rest);
        assert!(scheme("s3a", "b/k").contains("write s3://b/k"));
        assert!(scheme("S3", "b/k").contains("write s3://b/k"));
        assert!(scheme("gs", "b/k").contains("https://storage.googleapis.com/b/k"));
        for name in ["gs", "s3a", "HTTPS"] {
            let reason = scheme(name, "u:s3cret@b/k?X-Goog-Signature=s3cret");
            assert!(!reason.contains("s3cret"), "{reason}");
        }
        assert!(unknown_scheme("gs", &"k".repeat(1000)).len() < 1000);
        assert!(scheme("ftp", "h/k").ends_with("standard input"));
    }
}
