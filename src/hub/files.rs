//! The files of a push, and their upload to the storage of large files: the Git LFS batch API, in one part or in several.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use indicatif::DecimalBytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::client::{Call, Client, LFS, RequestBody};
use super::{HubError, io};

/// Start of a file by which the Hub tells text from binary. Bytes.
const SAMPLE: u64 = 512;
/// Files above this size always go to the storage of large files: the others are sent in one message. Bytes.
const MAX_REGULAR: u64 = 5 << 20;

/// A file to push.
#[derive(Debug)]
pub(super) struct HubFile {
    /// Path in the repository, with slashes.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) sha256: String,
    /// Git blob id (SHA-1) of a file up to [`MAX_REGULAR`].
    git_id: Option<String>,
}

impl HubFile {
    /// Reads a file of `folder` and computes its hashes.
    pub(super) fn new(folder: &Path, name: &str) -> Result<Self, HubError> {
        let path = folder.join(name);
        let mut file = fs::File::open(&path).map_err(io(&path))?;
        let size = file.metadata().map_err(io(&path))?.len();
        let mut hash = Sha256::new();
        let git_id = if size <= MAX_REGULAR {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map_err(io(&path))?;
            hash.update(&bytes);
            let git = Sha1::new().chain_update(format!("blob {size}\0"));
            Some(format!("{:x}", git.chain_update(&bytes).finalize()))
        } else {
            std::io::copy(&mut file, &mut hash).map_err(io(&path))?;
            None
        };
        Ok(Self {
            name: name.to_owned(),
            path,
            size,
            sha256: format!("{:x}", hash.finalize()),
            git_id,
        })
    }

    /// Entry of the `preupload` request, which asks how the Hub stores the file.
    pub(super) fn preupload_entry(&self) -> Result<Value, HubError> {
        let mut sample = Vec::new();
        fs::File::open(&self.path)
            .and_then(|file| file.take(SAMPLE).read_to_end(&mut sample))
            .map_err(io(&self.path))?;
        let sample = BASE64_STANDARD.encode(sample);
        Ok(json!({"path": self.name, "sample": sample, "size": self.size}))
    }

    /// Whether `oid`, a SHA-256 or a Git blob id, is this file's.
    pub(super) fn has_oid(&self, oid: &str) -> bool {
        oid == self.sha256 || self.git_id.as_deref() == Some(oid)
    }

    /// Whether the file goes to the storage of large files; `lfs`: the Hub asks for it.
    pub(super) fn is_large(&self, lfs: bool) -> bool {
        // The storage refuses empty files.
        self.size > 0 && (lfs || self.git_id.is_none())
    }

    /// The file's line in a commit.
    pub(super) fn commit_line(&self, large: bool) -> Result<Value, HubError> {
        if large {
            let value = json!({
                "path": self.name, "algo": "sha256", "oid": self.sha256, "size": self.size,
            });
            return Ok(json!({"key": "lfsFile", "value": value}));
        }
        let content = fs::read(&self.path).map_err(io(&self.path))?;
        let content = BASE64_STANDARD.encode(content);
        let value = json!({"content": content, "path": self.name, "encoding": "base64"});
        Ok(json!({"key": "file", "value": value}))
    }
}

#[derive(Deserialize)]
struct LfsBatch {
    objects: Vec<LfsObject>,
}

#[derive(Deserialize)]
struct LfsObject {
    oid: String,
    actions: Option<LfsActions>,
    error: Option<LfsError>,
}

#[derive(Deserialize)]
struct LfsError {
    code: u16,
    message: String,
}

#[derive(Deserialize)]
struct LfsActions {
    upload: Option<LfsAction>,
    verify: Option<LfsAction>,
}

#[derive(Deserialize)]
struct LfsAction {
    href: String,
    header: Option<Map<String, Value>>,
}

/// Uploads files to the storage of large files, except those it already has.
pub(super) fn store(client: &Client<'_>, files: &[&HubFile]) -> Result<(), HubError> {
    // By content: two files may be equal.
    let mut by_hash: BTreeMap<&str, &HubFile> = BTreeMap::new();
    for file in files {
        by_hash.entry(&file.sha256).or_insert(file);
    }
    if by_hash.is_empty() {
        return Ok(());
    }
    let objects: Vec<Value> = by_hash
        .values()
        .map(|file| json!({"oid": file.sha256, "size": file.size}))
        .collect();
    let request = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        "ref": {"name": "main"},
    })
    .to_string();
    let call = Call {
        what: "ask where to upload the weights".to_owned(),
        method: "POST",
        url: &client.url(&format!("{}.git/info/lfs/objects/batch", client.id)),
        headers: vec![("accept", LFS)],
        body: lfs_body(&request),
        expects: &[],
    };
    let batch: LfsBatch = client.call(&call)?.json()?;
    let answered: BTreeSet<&str> = batch.objects.iter().map(|o| o.oid.as_str()).collect();
    if let Some(file) = by_hash.values().find(|f| !answered.contains(&*f.sha256)) {
        return Err(HubError::InvalidResponse {
            what: call.what,
            cause: format!("it does not list {}", file.name),
        });
    }
    for object in &batch.objects {
        let Some(file) = by_hash.get(object.oid.as_str()) else {
            continue;
        };
        if let Some(error) = &object.error {
            return Err(HubError::Refused {
                what: format!("store {}", file.name),
                status: error.code,
                message: client.quoted(&error.message),
            });
        }
        let actions = object.actions.as_ref();
        let Some(action) = actions.and_then(|actions| actions.upload.as_ref()) else {
            errln!("  {}: the Hub already has it", file.name);
            continue;
        };
        errln!("  {}: {}", file.name, DecimalBytes(file.size));
        send(client, file, action)?;
        if let Some(verify) = actions.and_then(|actions| actions.verify.as_ref()) {
            let body = json!({"oid": file.sha256, "size": file.size}).to_string();
            client.call(&Call {
                what: format!("verify {}", file.name),
                method: "POST",
                url: &on_endpoint(client, &verify.href),
                headers: vec![("accept", LFS)],
                body: lfs_body(&body),
                expects: &[],
            })?;
        }
    }
    Ok(())
}

fn lfs_body(text: &str) -> RequestBody<'_> {
    RequestBody::Text {
        text,
        content_type: LFS,
    }
}

/// The URL on the configured endpoint: a mirror may pass on URLs of the Hub.
fn on_endpoint(client: &Client<'_>, url: &str) -> String {
    match url.strip_prefix("https://huggingface.co/") {
        Some(path) => client.url(path),
        None => url.to_owned(),
    }
}

fn send(client: &Client<'_>, file: &HubFile, action: &LfsAction) -> Result<(), HubError> {
    let none = Map::new();
    let header = action.header.as_ref().unwrap_or(&none);
    let href = on_endpoint(client, &action.href);
    match header.get("chunk_size") {
        Some(chunk) => send_parts(client, file, header, &href, chunk),
        None => {
            let headers = header.iter();
            let headers =
                headers.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)));
            client
                .call(&Call {
                    what: format!("store {}", file.name),
                    method: "PUT",
                    url: &href,
                    headers: headers.collect(),
                    body: RequestBody::FilePart {
                        path: &file.path,
                        offset: 0,
                        length: file.size,
                    },
                    expects: &[],
                })
                .map(drop)
        }
    }
}

/// Uploads a file in parts of `chunk` bytes. `header` has the URL of each part by its number; the parts' ETags go to `complete`.
fn send_parts(
    client: &Client<'_>,
    file: &HubFile,
    header: &Map<String, Value>,
    complete: &str,
    chunk: &Value,
) -> Result<(), HubError> {
    let what = format!("store {}", file.name);
    let invalid = |cause: &str| HubError::InvalidResponse {
        what: what.clone(),
        cause: cause.to_owned(),
    };
    let chunk = chunk
        .as_u64()
        .or_else(|| chunk.as_str()?.parse().ok())
        .filter(|&chunk| chunk > 0)
        .ok_or_else(|| invalid("chunk_size is not a number"))?;
    let urls: BTreeMap<u64, &str> = header
        .iter()
        .filter_map(|(number, url)| Some((number.parse().ok()?, url.as_str()?)))
        .collect();
    let count = file.size.div_ceil(chunk);
    if !urls.keys().copied().eq(1..=count) {
        return Err(invalid("the URLs of the parts don't cover the file"));
    }
    let mut parts = Vec::new();
    for (number, url) in &urls {
        let offset = (number - 1) * chunk;
        let response = client.call(&Call {
            what: format!("store part {number} of {count} of {}", file.name),
            method: "PUT",
            url,
            headers: Vec::new(),
            body: RequestBody::FilePart {
                path: &file.path,
                offset,
                length: chunk.min(file.size - offset),
            },
            expects: &[],
        })?;
        let etag = response.etag.ok_or_else(|| invalid("a part has no ETag"))?;
        parts.push(json!({"partNumber": number, "etag": etag}));
    }
    let body = json!({"oid": file.sha256, "parts": parts}).to_string();
    client
        .call(&Call {
            what: format!("join the parts of {}", file.name),
            method: "POST",
            url: complete,
            headers: vec![("accept", LFS)],
            body: lfs_body(&body),
            expects: &[],
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_file_matches_sha256_and_git_id() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.txt"), "hello\n").unwrap();
        let file = HubFile::new(folder.path(), "a.txt").unwrap();
        // Printed by `git hash-object` and `sha256sum`.
        assert!(file.has_oid("ce013625030ba8dba906f756967f9e9ca394464a"));
        assert!(file.has_oid("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"));
        assert!(!file.has_oid("ce013625030ba8dba906f756967f9e9ca394464b"));
        assert!(file.is_large(true) && !file.is_large(false));
        let line = file.commit_line(false).unwrap();
        assert_eq!(line["value"]["content"], "aGVsbG8K");
        assert_eq!(file.preupload_entry().unwrap()["sample"], "aGVsbG8K");
        assert!(HubFile::new(folder.path(), "b.txt").is_err());
    }

    #[test]
    fn large_files_are_large_whatever_the_hub_asks() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("large")).unwrap();
        file.set_len(MAX_REGULAR + 1).unwrap();
        fs::write(folder.path().join("empty"), "").unwrap();
        assert!(
            HubFile::new(folder.path(), "large")
                .unwrap()
                .is_large(false)
        );
        assert!(!HubFile::new(folder.path(), "empty").unwrap().is_large(true));
    }
}
