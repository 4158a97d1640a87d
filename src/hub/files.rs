//! The files of a push, and their way into the storage of large files: Git LFS's batch interface, in one part or in several.

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

use super::client::{Body, Call, Client, LFS};
use super::{HubError, io};

/// What the Hub looks at to tell a text from a binary file. Bytes.
const SAMPLE: u64 = 512;
/// Files above this go into the storage of large files in any case, since the rest of a commit is one message. Bytes.
const MAX_REGULAR: u64 = 5 << 20;

/// A file to be pushed.
#[derive(Debug)]
pub(super) struct Upload {
    /// Its path in the repository, with slashes.
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) sha256: String,
    /// Its name as a blob of Git, if it is small.
    git: Option<String>,
}

impl Upload {
    /// Reads a file of `folder` through once.
    pub(super) fn new(folder: &Path, name: &str) -> Result<Self, HubError> {
        let path = folder.join(name);
        let mut file = fs::File::open(&path).map_err(io(&path))?;
        let size = file.metadata().map_err(io(&path))?.len();
        let mut hash = Sha256::new();
        let git = if size <= MAX_REGULAR {
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
            git,
        })
    }

    /// The line of the Hub's question how to store it.
    pub(super) fn question(&self) -> Result<Value, HubError> {
        let mut sample = Vec::new();
        fs::File::open(&self.path)
            .and_then(|file| file.take(SAMPLE).read_to_end(&mut sample))
            .map_err(io(&self.path))?;
        let sample = BASE64_STANDARD.encode(sample);
        Ok(json!({"path": self.name, "sample": sample, "size": self.size}))
    }

    /// Whether a file of the repository is the same as this one.
    pub(super) fn is(&self, oid: &str) -> bool {
        oid == self.sha256 || self.git.as_deref() == Some(oid)
    }

    /// Whether it goes into the storage of large files, if the Hub wishes so for it.
    pub(super) fn is_large(&self, wished: bool) -> bool {
        // The storage takes no empty files.
        self.size > 0 && (wished || self.git.is_none())
    }

    /// Its line in a commit.
    pub(super) fn line(&self, large: bool) -> Result<Value, HubError> {
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
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    code: u16,
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    header: Option<Map<String, Value>>,
}

/// Brings files into the storage of large files; those it has are not sent.
pub(super) fn store(client: &Client<'_>, uploads: &[&Upload]) -> Result<(), HubError> {
    // Two files may be the same.
    let mut wanted: BTreeMap<&str, &Upload> = BTreeMap::new();
    for upload in uploads {
        wanted.entry(&upload.sha256).or_insert(upload);
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let objects: Vec<Value> = wanted
        .values()
        .map(|upload| json!({"oid": upload.sha256, "size": upload.size}))
        .collect();
    let question = json!({
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        "ref": {"name": "main"},
    });
    let call = Call {
        what: "ask where the weights go".to_owned(),
        method: "POST",
        url: &client.url(&format!("{}.git/info/lfs/objects/batch", client.id)),
        headers: vec![("accept", LFS)],
        body: Body::Text(&question.to_string(), LFS),
        expects: &[],
    };
    let batch: Batch = client.call(&call)?.json()?;
    let answered: BTreeSet<&str> = batch.objects.iter().map(|o| o.oid.as_str()).collect();
    if let Some(upload) = wanted.values().find(|u| !answered.contains(&*u.sha256)) {
        return Err(HubError::Answer {
            what: call.what,
            cause: format!("nothing is said of {}", upload.name),
        });
    }
    for object in &batch.objects {
        let Some(upload) = wanted.get(object.oid.as_str()) else {
            continue;
        };
        if let Some(error) = &object.error {
            return Err(HubError::Refused {
                what: format!("store {}", upload.name),
                status: error.code,
                said: client.repeated(&error.message),
            });
        }
        let actions = object.actions.as_ref();
        let Some(action) = actions.and_then(|actions| actions.upload.as_ref()) else {
            errln!("  {}: the Hub has it already", upload.name);
            continue;
        };
        errln!("  {}: {}", upload.name, DecimalBytes(upload.size));
        send(client, upload, action)?;
        if let Some(verify) = actions.and_then(|actions| actions.verify.as_ref()) {
            let body = json!({"oid": upload.sha256, "size": upload.size}).to_string();
            client.call(&Call {
                what: format!("have {} checked", upload.name),
                method: "POST",
                url: &own_address(client, &verify.href),
                headers: vec![("accept", LFS)],
                body: Body::Text(&body, LFS),
                expects: &[],
            })?;
        }
    }
    Ok(())
}

/// A mirror may hand on the Hub's own addresses.
fn own_address(client: &Client<'_>, url: &str) -> String {
    match url.strip_prefix("https://huggingface.co/") {
        Some(path) => client.url(path),
        None => url.to_owned(),
    }
}

fn send(client: &Client<'_>, upload: &Upload, action: &Action) -> Result<(), HubError> {
    let none = Map::new();
    let header = action.header.as_ref().unwrap_or(&none);
    let href = own_address(client, &action.href);
    match header.get("chunk_size") {
        Some(chunk) => send_parts(client, upload, header, &href, chunk),
        None => {
            let headers = header.iter();
            let headers =
                headers.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)));
            client
                .call(&Call {
                    what: format!("store {}", upload.name),
                    method: "PUT",
                    url: &href,
                    headers: headers.collect(),
                    body: Body::Part(&upload.path, 0, upload.size),
                    expects: &[],
                })
                .map(drop)
        }
    }
}

/// The header holds the parts' addresses by number; `complete` is told their ETags.
fn send_parts(
    client: &Client<'_>,
    upload: &Upload,
    header: &Map<String, Value>,
    complete: &str,
    chunk: &Value,
) -> Result<(), HubError> {
    let what = format!("store {}", upload.name);
    let wrong = |cause: &str| HubError::Answer {
        what: what.clone(),
        cause: cause.to_owned(),
    };
    let chunk = chunk
        .as_u64()
        .or_else(|| chunk.as_str()?.parse().ok())
        .filter(|&chunk| chunk > 0)
        .ok_or_else(|| wrong("chunk_size is no number"))?;
    let urls: BTreeMap<u64, &str> = header
        .iter()
        .filter_map(|(number, url)| Some((number.parse().ok()?, url.as_str()?)))
        .collect();
    let count = upload.size.div_ceil(chunk);
    if !urls.keys().copied().eq(1..=count) {
        return Err(wrong("the parts' addresses don't cover the file"));
    }
    let mut parts = Vec::new();
    for (number, url) in &urls {
        let from = (number - 1) * chunk;
        let answer = client.call(&Call {
            what: format!("store part {number} of {count} of {}", upload.name),
            method: "PUT",
            url,
            headers: Vec::new(),
            body: Body::Part(&upload.path, from, chunk.min(upload.size - from)),
            expects: &[],
        })?;
        let etag = answer.etag.ok_or_else(|| wrong("a part has no ETag"))?;
        parts.push(json!({"partNumber": number, "etag": etag}));
    }
    let body = json!({"oid": upload.sha256, "parts": parts}).to_string();
    client
        .call(&Call {
            what: format!("put the parts of {} together", upload.name),
            method: "POST",
            url: complete,
            headers: vec![("accept", LFS)],
            body: Body::Text(&body, LFS),
            expects: &[],
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_both_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.txt"), "hello\n").unwrap();
        let upload = Upload::new(folder.path(), "a.txt").unwrap();
        // As `git hash-object` and `sha256sum` say.
        assert!(upload.is("ce013625030ba8dba906f756967f9e9ca394464a"));
        assert!(upload.is("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"));
        assert!(!upload.is("ce013625030ba8dba906f756967f9e9ca394464b"));
        assert!(upload.is_large(true) && !upload.is_large(false));
        let line = upload.line(false).unwrap();
        assert_eq!(line["value"]["content"], "aGVsbG8K");
        assert_eq!(upload.question().unwrap()["sample"], "aGVsbG8K");
        assert!(Upload::new(folder.path(), "b.txt").is_err());
    }

    #[test]
    fn size_decides_where_the_hub_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("large")).unwrap();
        file.set_len(MAX_REGULAR + 1).unwrap();
        fs::write(folder.path().join("empty"), "").unwrap();
        assert!(Upload::new(folder.path(), "large").unwrap().is_large(false));
        assert!(!Upload::new(folder.path(), "empty").unwrap().is_large(true));
    }
}
