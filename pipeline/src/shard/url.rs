//! URL syntax of shards. Pure text: no shard is looked up here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::http_url::HttpUrl;
use super::hub::HubFile;
use super::image_shard::ImageShard;
use super::mistakes;
use super::pattern::redact;
use super::pipe::unwrap_pipe;
use crate::text::{cut, escaped};

/// Endings of shards in folders and prefixes; other files there are passed over.
const SHARD_ENDINGS: [&str; 3] = [".tar", ".tar.gz", ".tgz"];

/// Why a shard URL is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// The text can't be the URL of a shard.
    #[error("shard URL {url:?}: {reason}")]
    Invalid {
        /// The text, without secrets.
        url: String,
        /// The fault, and the right form.
        reason: String,
    },
    /// No URL was given.
    #[error("no shard URL was given")]
    Empty,
}

pub(super) fn invalid(url: &str, reason: impl Into<String>) -> UrlError {
    UrlError::Invalid {
        url: cut(&redact(url)).into_owned(),
        reason: reason.into(),
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Location {
    S3 { bucket: String, key: String },
    Http(HttpUrl),
    Hub(HubFile),
    File(PathBuf),
    Images(ImageShard),
    Stdin,
}

/// The URL of a shard, or of a folder of shards if it ends in `/`.
///
/// `s3://bucket/key.tar`, `http://…`, `https://…`, `hf://datasets/USER/NAME/key.tar`, `file:///path`, plain
/// paths, and `-` for standard input; also the form of older webdataset scripts,
/// `pipe:aws s3 cp s3://bucket/key.tar -`: the URL is extracted from the command, which is never run.
///
/// `Display` and `Debug` are for people: without user, password and query of an HTTP URL, and with control characters escaped.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

    /// A file of a repository on the Hub.
    pub(crate) fn hub(file: HubFile) -> Self {
        Self(Location::Hub(file))
    }

    /// A part of a folder of images.
    pub(crate) fn images(shard: ImageShard) -> Self {
        Self(Location::Images(shard))
    }

    pub(crate) fn location(&self) -> &Location {
        &self.0
    }

    /// Whether this is the URL of a folder, which has to be listed.
    #[must_use]
    pub fn is_folder(&self) -> bool {
        match &self.0 {
            Location::S3 { key, .. } => key.is_empty() || key.ends_with('/'),
            Location::Http(url) => url.expose().ends_with('/'),
            Location::Hub(file) => file.path.is_empty() || file.path.ends_with('/'),
            Location::File(path) => path.as_os_str().to_string_lossy().ends_with('/'),
            Location::Images(_) | Location::Stdin => false,
        }
    }

    /// The local folder of images that this is a part of; `None` for every other shard.
    #[must_use]
    pub fn image_folder(&self) -> Option<&Path> {
        match &self.0 {
            Location::Images(shard) => Some(&shard.folder),
            _ => None,
        }
    }

    /// The name of the shard for hashes: equal for every signature and password that it is read with.
    #[must_use]
    pub fn identity(&self) -> String {
        match &self.0 {
            Location::Http(url) => url.identity(),
            _ => self.whole(),
        }
    }

    /// The text that is parsed as this URL.
    pub(crate) fn whole(&self) -> String {
        match &self.0 {
            Location::S3 { bucket, key } => format!("s3://{bucket}/{key}"),
            Location::Http(url) => url.expose().to_owned(),
            Location::Hub(file) => file.to_string(),
            // Without `file://` the path would be parsed as something else.
            Location::File(path) if path.is_absolute() && !is_plain(&path.to_string_lossy()) => {
                format!("file://{}", path.display())
            }
            Location::File(path) => path.display().to_string(),
            Location::Images(shard) => shard.to_string(),
            Location::Stdin => "-".to_owned(),
        }
    }

    /// The folder of the shard, ending in `/` and without a query; `None` for standard input.
    #[must_use]
    pub fn folder(&self) -> Option<Self> {
        let parent = |text: &str| match text.rfind('/') {
            Some(slash) => text[..=slash].to_owned(),
            None => String::new(),
        };
        Some(Self(match &self.0 {
            Location::S3 { bucket, key } => Location::S3 {
                bucket: bucket.clone(),
                key: parent(key),
            },
            Location::Http(url) => {
                let url = url.expose();
                Location::Http(HttpUrl::new(parent(
                    url.split(['?', '#']).next().unwrap_or(url),
                )))
            }
            Location::Hub(file) => Location::Hub(HubFile {
                path: parent(&file.path),
                ..file.clone()
            }),
            Location::File(path) => {
                let folder = path
                    .parent()
                    .filter(|folder| !folder.as_os_str().is_empty());
                // Joining an empty component adds a slash.
                Location::File(folder.unwrap_or(Path::new(".")).join(""))
            }
            Location::Images(shard) => Location::File(shard.folder.join("")),
            Location::Stdin => return None,
        }))
    }

    /// The object called `name` in this [folder](Self::folder).
    #[must_use]
    pub fn join(&self, name: &str) -> Self {
        Self(match &self.0 {
            Location::S3 { bucket, key } => Location::S3 {
                bucket: bucket.clone(),
                key: format!("{key}{name}"),
            },
            Location::Http(url) => Location::Http(HttpUrl::new(format!("{}{name}", url.expose()))),
            Location::Hub(file) => Location::Hub(HubFile {
                path: format!("{}{name}", file.path),
                ..file.clone()
            }),
            Location::File(path) => Location::File(path.join(name)),
            Location::Images(shard) => Location::File(shard.folder.join(name)),
            Location::Stdin => Location::Stdin,
        })
    }

    /// The file name of the shard, as `00000.tar`. `.tar.gz` and `.tgz` become `.tar`; the name of standard input is
    /// `stdin.tar`.
    #[must_use]
    pub fn name(&self) -> String {
        let file = self.file_name();
        let stem = [".tar.gz", ".tgz"]
            .iter()
            .find_map(|ending| file.strip_suffix(ending));
        match stem {
            Some(stem) if !stem.is_empty() => format!("{stem}.tar"),
            _ => file,
        }
    }

    /// Whether a folder's listing includes this file as a shard.
    pub(crate) fn is_shard(&self) -> bool {
        let file = self.file_name();
        SHARD_ENDINGS.iter().any(|ending| file.ends_with(ending))
    }

    fn file_name(&self) -> String {
        let whole = match &self.0 {
            Location::S3 { key, .. } => key.as_str().into(),
            Location::Http(url) => {
                let path = url.expose().split(['?', '#']).next();
                path.unwrap_or_default().into()
            }
            Location::Hub(file) => file.path.as_str().into(),
            Location::File(path) => path.to_string_lossy(),
            Location::Images(shard) => shard.name().into(),
            Location::Stdin => "stdin.tar".into(),
        };
        let trimmed = whole.trim_end_matches('/');
        trimmed.rsplit('/').next().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for ShardUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Location::Http(url) => f.write_str(&escaped(&url.to_string())),
            _ => f.write_str(&escaped(&self.whole())),
        }
    }
}

impl fmt::Debug for ShardUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShardUrl({self})")
    }
}

impl FromStr for ShardUrl {
    type Err = UrlError;

    /// Reads one URL. Braces are taken as they are: see [`expand`](super::expand()).
    fn from_str(text: &str) -> Result<Self, UrlError> {
        let url = &*unwrap_pipe(text.trim())?;
        if url.is_empty() {
            return Err(UrlError::Empty);
        }
        if url == "-" {
            return Ok(Self(Location::Stdin));
        }
        if url.starts_with('@') {
            return Err(invalid(
                url,
                "names a list of shards where a shard is needed; a list may stand in data.shards, and not in another \
                 list (a file whose name begins with '@' is written ./@…)",
            ));
        }
        mistakes::refuse(url)?;
        if let Some(rest) = url.strip_prefix("hf://") {
            return HubFile::parse(rest)
                .map(|file| Self(Location::Hub(file)))
                .map_err(|reason| invalid(url, reason));
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
            return Ok(Self(Location::Http(HttpUrl::new(url))));
        }
        if let Some(rest) = url.strip_prefix("file://") {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            // A host, or a path that would be another URL without its scheme.
            if !path.starts_with('/') {
                return Err(invalid(
                    url,
                    "has no absolute path; the form is file:///path/to/shard.tar",
                ));
            }
            return Ok(Self::file(Path::new(path)));
        }
        if let Some((scheme, rest)) = url.split_once("://") {
            return Err(invalid(url, mistakes::unknown_scheme(scheme, rest)));
        }
        Ok(Self::file(url))
    }
}

/// Whether the path is parsed as that path.
fn is_plain(path: &str) -> bool {
    !path.contains("://") && path.trim() == path && mistakes::refuse(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        url.parse::<ShardUrl>().unwrap_err().to_string()
    }

    #[test]
    fn url_kinds_are_told_apart() {
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
        let hub: ShardUrl = "hf://datasets/u/n/a/b.tar".parse().unwrap();
        assert_eq!(
            (hub.to_string(), hub.name()),
            ("hf://datasets/u/n/a/b.tar".into(), "b.tar".into())
        );
        assert!(!hub.is_folder() && hub.folder().unwrap().is_folder());
        let stdin: ShardUrl = " - ".parse().unwrap();
        assert_eq!(stdin.location(), &Location::Stdin);
        assert_eq!(
            (stdin.to_string(), stdin.name()),
            ("-".into(), "stdin.tar".into())
        );
        assert!(!stdin.is_folder());
        assert_eq!("./-".parse::<ShardUrl>().unwrap(), ShardUrl::file("./-"));
    }

    #[test]
    fn url_name_is_that_of_the_tar() {
        let url = |text: &str| text.parse::<ShardUrl>().unwrap();
        for (text, name) in [
            ("s3://b/x/0.tar", "0.tar"),
            ("s3://b/x/0.tar.gz", "0.tar"),
            ("https://h/0.tgz?sig=1", "0.tar"),
            ("a/.tgz", ".tgz"),
        ] {
            assert!(url(text).is_shard(), "{text}");
            assert_eq!(url(text).name(), name);
        }
        for text in ["s3://b/0.json", "a/0.tar.bz2", "a/0.gz", "a/tar"] {
            assert!(!url(text).is_shard(), "{text}");
        }
    }

    #[test]
    fn url_folder_joins_names() {
        for (shard, folder) in [
            ("s3://b/x/0.tar", "s3://b/x/"),
            ("s3://b/0.tar", "s3://b/"),
            ("https://h/a/0.tar?sig=/1", "https://h/a/"),
            ("a/b/0.tar", "a/b/"),
            ("0.tar", "./"),
            ("/0.tar", "/"),
        ] {
            let parent = shard.parse::<ShardUrl>().unwrap().folder().unwrap();
            assert_eq!(parent.to_string(), folder);
            assert!(parent.is_folder());
            let beside = parent.join("manifest.json");
            assert_eq!(beside.to_string(), format!("{folder}manifest.json"));
            assert_eq!(beside.folder(), Some(parent));
        }
        assert_eq!("-".parse::<ShardUrl>().unwrap().folder(), None);
    }

    #[test]
    fn url_is_shown_without_secrets_and_control_characters() {
        for (text, shown) in [
            (
                "https://u:p@h/a.tar?X-Amz-Signature=abc",
                "https://REDACTED@h/a.tar?REDACTED",
            ),
            ("s3://b/a?c.tar", "s3://b/a?c.tar"),
            ("s3://b/a\u{1b}[2J\n.tar", "s3://b/a\\u001b[2J\\u000a.tar"),
        ] {
            let url: ShardUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), format!("ShardUrl({shown})"));
            assert_eq!(url.whole(), text);
        }
    }

    #[test]
    fn url_errors_name_the_fault() {
        assert!(refused("s3://bucket").contains("s3://bucket/key.tar"));
        assert!(refused("s3:///key").contains("no bucket"));
        assert!(refused("ftp://host/key").contains("known are s3://"));
        assert!(refused("gs://bucket/key").contains("https://storage.googleapis.com"));
        assert!(refused("hf://datasets/a/b").contains("hf://datasets/USER/NAME"));
        assert!(refused("@list.txt").contains("names a list"));
        assert!(refused("file://s3://bucket/0.tar").contains("absolute path"));
        assert!(refused("http:///x").contains("has no host"));
        assert_eq!(" ".parse::<ShardUrl>(), Err(UrlError::Empty));
        let odd: ShardUrl = "file:///data/a*.tar".parse().unwrap();
        assert_eq!(odd.to_string(), "file:///data/a*.tar");
    }
}
