//! Where bytes go: a folder, or a prefix in S3.
//!
//! An object appears whole or not at all, and what is written over stands until then. In a folder it is written aside
//! and renamed; in S3 it is one request if it is small, else an upload in parts of which a few are on their way at once, so
//! that memory is bounded however large the object becomes. Faults that may pass are retried part by part. Nothing
//! here knows what the bytes mean.
//!
//! Every call blocks until it is done; none may be made on a thread of the runtime.

mod bucket;
mod folder;
mod upload;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use crate::shard::{Location, ShardUrl};
use crate::source::{ObjectReader, SourceError, Sources};

use bucket::Bucket;
use folder::{FileWriter, Folder};
use upload::Upload;

/// A folder or a prefix in S3 that objects are written to. Clones are the same place.
#[derive(Debug, Clone)]
pub struct Destination(Place);

#[derive(Debug, Clone)]
enum Place {
    Folder(Folder),
    Bucket(Arc<Bucket>),
}

/// An object of a destination.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its name in the destination, with `/` between folders.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
}

/// What a destination knows of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Size in bytes.
    pub size: u64,
    /// As given to [`Destination::create_with`]; always empty in a folder, which has no place for it.
    pub metadata: BTreeMap<String, String>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

/// How uploads are cut; for tests that must not write gigabytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartOptions {
    /// Size of the first parts. Bytes; at least 5 MiB on AWS. It doubles every 1,000 parts, so that the 10,000 there may be
    /// make up the largest object S3 can hold.
    pub bytes: usize,
    /// Parts on their way at once. So many and one more are held in memory.
    pub in_flight: usize,
}

impl Default for PartOptions {
    fn default() -> Self {
        Self {
            bytes: 8 << 20,
            in_flight: 3,
        }
    }
}

impl Sources {
    /// A place to write to: `s3://bucket/prefix/` (with or without the last `/`), else a folder, which is made when the
    /// first object is. Touches no network.
    ///
    /// # Errors
    /// [`SourceError::Url`] or [`SourceError::Unsupported`] if the target can't be written to.
    pub fn destination(&self, target: &str, runtime: &Handle) -> Result<Destination, SourceError> {
        self.destination_with(target, runtime, PartOptions::default())
    }

    /// As [`Sources::destination`], with other parts.
    ///
    /// # Errors
    /// As [`Sources::destination`].
    pub fn destination_with(
        &self,
        target: &str,
        runtime: &Handle,
        parts: PartOptions,
    ) -> Result<Destination, SourceError> {
        let url: ShardUrl = match target.starts_with("s3://") && !target.ends_with('/') {
            true => format!("{target}/").parse()?,
            false => target.parse()?,
        };
        match url.location() {
            Location::File(path) => Ok(Destination::folder(path)),
            Location::S3 { bucket, key } => {
                let bucket = Bucket::new(self.clone(), runtime.clone(), bucket, key, parts);
                Ok(Destination(Place::Bucket(Arc::new(bucket))))
            }
            Location::Http(_) | Location::Stdin => Err(SourceError::Unsupported {
                url: url.redacted(),
                cause: "can't be written to; name a folder or s3://bucket/prefix/".to_owned(),
            }),
        }
    }
}

impl Destination {
    /// A folder, which is made when the first object is.
    #[must_use]
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Place::Folder(Folder::new(path.into())))
    }

    /// Begins an object. Names are relative, with `/` between folders.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be begun there.
    pub fn create(&self, name: &str) -> Result<ObjectWriter, SourceError> {
        self.create_with(name, BTreeMap::new())
    }

    /// Begins an object that carries metadata in S3: keys in lower case, values in ASCII. A folder drops it.
    ///
    /// # Errors
    /// As [`Destination::create`].
    pub fn create_with(
        &self,
        name: &str,
        metadata: BTreeMap<String, String>,
    ) -> Result<ObjectWriter, SourceError> {
        self.check(name)?;
        let target = match &self.0 {
            Place::Folder(folder) => Target::File(folder.create(name)?),
            Place::Bucket(bucket) => {
                Target::Upload(Box::new(Upload::new(Arc::clone(bucket), name, metadata)))
            }
        };
        Ok(ObjectWriter {
            target,
            hash: Sha256::new(),
            bytes: 0,
        })
    }

    /// Writes a whole object.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be written.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<Written, SourceError> {
        let mut writer = self.create(name)?;
        writer.append(content)?;
        writer.finish()
    }

    /// Every object whose name begins with `below`, by name.
    ///
    /// # Errors
    /// [`SourceError`] if the place can't be listed; a folder that does not exist is empty.
    pub fn list(&self, below: &str) -> Result<Vec<Entry>, SourceError> {
        let mut entries = match &self.0 {
            Place::Folder(folder) => folder.list(below)?,
            Place::Bucket(bucket) => bucket.list(below)?,
        };
        entries.sort();
        Ok(entries)
    }

    /// Opens an object for reading.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] if there is none, else what kept it from being read.
    pub fn open(&self, name: &str) -> Result<ReadObject, SourceError> {
        self.check(name)?;
        match &self.0 {
            Place::Folder(folder) => Ok(ReadObject(Content::File(folder.open(name)?))),
            Place::Bucket(bucket) => Ok(ReadObject(Content::Object {
                reader: Box::new(bucket.open(name)?),
                runtime: bucket.runtime().clone(),
                chunk: Bytes::new(),
            })),
        }
    }

    /// A whole object.
    ///
    /// # Errors
    /// As [`Destination::open`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let mut content = Vec::new();
        self.open(name)?
            .read_to_end(&mut content)
            .map_err(|error| self.failed(name, error))?;
        Ok(content)
    }

    /// What is known of an object without reading it; `None` if there is none.
    ///
    /// # Errors
    /// [`SourceError`] if that can't be found out.
    pub fn facts(&self, name: &str) -> Result<Option<Facts>, SourceError> {
        self.check(name)?;
        match &self.0 {
            Place::Folder(folder) => folder.facts(name),
            Place::Bucket(bucket) => bucket.facts(name),
        }
    }

    /// Removes an object; one that is not there is no error.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be removed.
    pub fn remove(&self, name: &str) -> Result<(), SourceError> {
        self.check(name)?;
        match &self.0 {
            Place::Folder(folder) => folder.remove(name),
            Place::Bucket(bucket) => bucket.remove(name),
        }
    }

    /// Clears away what killed processes left unfinished: files written aside, uploads that were neither completed nor
    /// aborted. `ours` is asked by the name of the object they were to become; an object that another process is writing
    /// now would be lost to it. How many there were.
    ///
    /// # Errors
    /// [`SourceError`] if they can't be listed or removed. A server that does not list uploads has none.
    pub fn clear_unfinished(&self, ours: impl Fn(&str) -> bool) -> Result<usize, SourceError> {
        match &self.0 {
            Place::Folder(folder) => folder.clear_unfinished(ours),
            Place::Bucket(bucket) => bucket.clear_unfinished(ours),
        }
    }

    /// Where an object is, for messages.
    #[must_use]
    pub fn place(&self, name: &str) -> String {
        match &self.0 {
            Place::Folder(folder) => folder.path(name).display().to_string(),
            Place::Bucket(bucket) => bucket.target(name).url.redacted(),
        }
    }

    /// What an i/o error met with an object was.
    #[must_use]
    pub fn failed(&self, name: &str, error: io::Error) -> SourceError {
        error.downcast().unwrap_or_else(|error| SourceError::File {
            url: self.place(name),
            cause: error.to_string(),
        })
    }

    fn check(&self, name: &str) -> Result<(), SourceError> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        match name.split('/').all(plain) {
            true => Ok(()),
            false => Err(SourceError::Unsupported {
                url: format!("{self}{name}"),
                cause: format!("{name:?} names no object"),
            }),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Folder(folder) => write!(f, "{}/", folder.root().display()),
            Place::Bucket(bucket) => write!(f, "{}", bucket.target("").url.redacted()),
        }
    }
}

/// An object that is being written. Dropped before [`ObjectWriter::finish`], nothing of it is left.
#[derive(Debug)]
pub struct ObjectWriter {
    target: Target,
    hash: Sha256,
    bytes: u64,
}

#[derive(Debug)]
enum Target {
    File(FileWriter),
    Upload(Box<Upload>),
}

impl ObjectWriter {
    /// Adds to the object. What [`Write`] does, with the error as it was.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be written; the object is given up then.
    pub fn append(&mut self, content: &[u8]) -> Result<(), SourceError> {
        match &mut self.target {
            Target::File(file) => file.append(content)?,
            Target::Upload(upload) => upload.append(content)?,
        }
        self.hash.update(content);
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Puts the object in its place, whole, and waits until it is kept there.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be; nothing of it is left then.
    pub fn finish(self) -> Result<Written, SourceError> {
        match self.target {
            Target::File(file) => file.finish()?,
            Target::Upload(upload) => upload.finish()?,
        }
        let digest = self.hash.finalize();
        Ok(Written {
            bytes: self.bytes,
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

impl Write for ObjectWriter {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        self.append(content).map_err(io::Error::other)?;
        Ok(content.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An object that is being read.
#[derive(Debug)]
pub struct ReadObject(Content);

#[derive(Debug)]
enum Content {
    File(std::fs::File),
    Object {
        reader: Box<ObjectReader>,
        runtime: Handle,
        chunk: Bytes,
    },
}

impl Read for ReadObject {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Content::File(file) => file.read(into),
            Content::Object {
                reader,
                runtime,
                chunk,
            } => {
                while chunk.is_empty() {
                    match runtime.block_on(reader.next()).map_err(io::Error::other)? {
                        Some(next) => *chunk = next,
                        None => return Ok(0),
                    }
                }
                let size = into.len().min(chunk.len());
                chunk.copy_to_slice(&mut into[..size]);
                Ok(size)
            }
        }
    }
}
