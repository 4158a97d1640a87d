//! Models under a prefix in S3, read with the pipeline's client.
//!
//! The cache is `$XDG_CACHE_HOME/coffey/models` (or `~/.cache/coffey/models`), with one folder for each server and prefix:
//! `blobs/` has the objects, named by key, size and ETag; `snapshots/` has folders of links to the blobs, one for each state
//! of the prefix. A changed object becomes a new blob and a new snapshot; a run can continue to read the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use coffey_pipeline::{ObjectInfo, S3Options, ShardUrl, SourceError, Sources};
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use super::files::{self, Components};
use super::progress::FileProgress;
use super::{PretrainedError, cache, io};
use crate::process;

/// Name prefix of unfinished files.
const TEMPORARY: &str = ".writing-";

/// Fetches `components` of the model under `prefix` (`s3://bucket/…/`); returns a local folder.
pub(super) fn fetch(
    prefix: &str,
    components: &Components,
    sources: &Sources,
    runtime: &Handle,
) -> Result<PathBuf, PretrainedError> {
    let not_a_model = |lacks: String| PretrainedError::NotAModel {
        model: prefix.to_owned(),
        lacks,
    };
    let url: ShardUrl = prefix.parse().map_err(|error| SourceError::Unsupported {
        url: prefix.to_owned(),
        cause: format!("{error}"),
    })?;
    let found = runtime.block_on(sources.objects(&url))?;
    if found.is_empty() {
        return Err(not_a_model("there is nothing under this prefix".to_owned()));
    }
    let objects: BTreeMap<&str, &ObjectInfo> = found
        .iter()
        .map(|object| (object.name.as_str(), object))
        .collect();
    let there: BTreeSet<String> = objects.keys().map(|name| (*name).to_owned()).collect();
    let plan = super::plan(prefix, components, &there, &|_| None)?;

    let server = server(sources.options(), process::env_var);
    let folder = cache::home("XDG_CACHE_HOME", process::env_var)?
        .join("coffey/models")
        .join(&digest([server.as_str(), prefix])[..16]);
    let _lock = cache::lock(&folder.join("lock"), prefix)?;
    let blobs = Blobs::open(folder.join("blobs"), prefix)?;
    let mut links = BTreeMap::new();
    let mut fetch = |name: &str| {
        let object = objects
            .get(name)
            .ok_or_else(|| not_a_model(format!("it has no {name}")))?;
        let blob = blobs.fetch(object, sources, runtime)?;
        links.insert(name.to_owned(), blob.clone());
        Ok::<_, PretrainedError>(blob)
    };
    let mut paths = BTreeMap::new();
    for name in &plan.files {
        paths.insert(name, fetch(name)?);
    }
    for index in &plan.indexes {
        let path = &paths[index];
        let shards = files::shards(index, path).map_err(not_a_model)?;
        files::missing_shards(index, &shards, &there).map_err(not_a_model)?;
        for shard in &shards {
            fetch(shard)?;
        }
    }
    snapshot(&folder.join("snapshots"), &links)
}

/// Identity of the S3 server: one prefix may have different objects on two servers.
fn server(options: &S3Options, env_var: impl Fn(&str) -> Option<String>) -> String {
    if let Some(root) = &options.embedded_root {
        let root = fs::canonicalize(root).unwrap_or_else(|_| root.clone());
        return format!("embedded {}", root.display());
    }
    options
        .endpoint_url
        .clone()
        .or_else(|| env_var("AWS_ENDPOINT_URL_S3"))
        .or_else(|| env_var("AWS_ENDPOINT_URL"))
        .unwrap_or_default()
}

/// SHA-256 in hex of a list of strings.
fn digest<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let mut sha = Sha256::new();
    for word in words {
        sha.update((word.len() as u64).to_le_bytes());
        sha.update(word);
    }
    format!("{:x}", sha.finalize())
}

/// The fetched objects of one prefix.
struct Blobs {
    folder: PathBuf,
    model: String,
}

impl Blobs {
    /// Removes files that killed processes left unfinished; the caller holds the lock.
    fn open(folder: PathBuf, model: &str) -> Result<Self, PretrainedError> {
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        for entry in folder.read_dir().map_err(io(&folder))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                fs::remove_file(entry.path()).map_err(io(&entry.path()))?;
            }
        }
        Ok(Self {
            folder,
            model: model.to_owned(),
        })
    }

    /// Path of this version of an object; fetches it if necessary.
    fn fetch(
        &self,
        object: &ObjectInfo,
        sources: &Sources,
        runtime: &Handle,
    ) -> Result<PathBuf, PretrainedError> {
        let modified = object.modified.map(|seconds| seconds.to_string());
        let path = self.folder.join(digest([
            object.name.as_str(),
            &object.size.to_string(),
            object.etag.as_deref().unwrap_or_default(),
            modified.as_deref().unwrap_or_default(),
        ]));
        if !fs::metadata(&path).is_ok_and(|there| there.len() == object.size) {
            runtime.block_on(self.download(object, &path, sources))?;
        }
        Ok(path)
    }

    async fn download(
        &self,
        object: &ObjectInfo,
        path: &Path,
        sources: &Sources,
    ) -> Result<(), PretrainedError> {
        let mut progress =
            FileProgress::new(&self.model, &object.name, Arc::new(AtomicU64::new(0)));
        progress.begin(object.size);
        let mut reader = sources.open(&object.url).await?;
        let mut file = tempfile::Builder::new()
            .prefix(TEMPORARY)
            .tempfile_in(&self.folder)
            .map_err(io(&self.folder))?;
        let mut length = 0;
        while let Some(chunk) = reader.next().await? {
            file.write_all(&chunk).map_err(io(file.path()))?;
            length += chunk.len() as u64;
            progress.add(chunk.len() as u64);
        }
        let is_other_version = match (&object.etag, reader.etag()) {
            (Some(listed), Some(read)) => listed != read,
            _ => false,
        };
        if length != object.size || is_other_version {
            return Err(SourceError::Changed {
                url: object.url.to_string(),
                offset: length,
                cause: format!(
                    "{} bytes of version {} were listed",
                    object.size,
                    object.etag.as_deref().unwrap_or("unknown")
                ),
            }
            .into());
        }
        file.as_file().sync_all().map_err(io(path))?;
        file.persist(path)
            .map_err(|error| io(path)(error.error))
            .map(drop)
    }
}

/// The folder that links each name to its blob; creates it if necessary.
fn snapshot(folder: &Path, links: &BTreeMap<String, PathBuf>) -> Result<PathBuf, PretrainedError> {
    let blobs: Vec<_> = links
        .values()
        .map(|blob| blob.file_name().unwrap_or_default().to_string_lossy())
        .collect();
    let words = links.keys().map(String::as_str);
    let words = words.chain(blobs.iter().map(AsRef::as_ref));
    let folder = folder.join(&digest(words)[..16]);
    for (name, blob) in links {
        let link = folder.join(name);
        if link.is_file() {
            continue;
        }
        // A broken link: the cache was moved.
        if link.is_symlink() {
            fs::remove_file(&link).map_err(io(&link))?;
        }
        let parent = link.parent().unwrap_or(&folder);
        fs::create_dir_all(parent).map_err(io(parent))?;
        let blob = std::path::absolute(blob).map_err(io(blob))?;
        std::os::unix::fs::symlink(blob, &link).map_err(io(&link))?;
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_identities_differ() {
        let none = |_: &str| None;
        let embedded = |root: &str| S3Options {
            embedded_root: Some(root.into()),
            ..S3Options::default()
        };
        let endpoint = S3Options {
            endpoint_url: Some("http://a".into()),
            ..S3Options::default()
        };
        let all = [
            server(&S3Options::default(), none),
            server(&S3Options::default(), |_| Some("http://b".into())),
            server(&endpoint, none),
            server(&embedded("src"), none),
            server(&embedded("tests"), none),
        ];
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(server(&embedded("src/../src"), none), all[3]);
    }

    #[test]
    fn snapshots_differ_when_a_blob_differs() {
        let root = tempfile::tempdir().unwrap();
        let (one, two) = (root.path().join("one"), root.path().join("two"));
        fs::write(&one, "1").unwrap();
        fs::write(&two, "2").unwrap();
        let links = |blob: &PathBuf| BTreeMap::from([("vae/config.json".to_owned(), blob.clone())]);
        let folder = root.path().join("snapshots");
        let first = snapshot(&folder, &links(&one)).unwrap();
        assert_eq!(snapshot(&folder, &links(&one)).unwrap(), first);
        let second = snapshot(&folder, &links(&two)).unwrap();
        let read = |folder: &Path| fs::read_to_string(folder.join("vae/config.json")).unwrap();
        assert_eq!((read(&first), read(&second)), ("1".into(), "2".into()));
    }
}
