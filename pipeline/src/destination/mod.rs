//! Writing: to a folder, or to a prefix in S3.
//!
//! A write is atomic: the object appears whole or not at all, and an earlier object stays until then. In a folder the
//! object is a temporary file that is renamed; in S3 it is one request if it is small, else an upload in parts with a few
//! parts in flight, so that memory is bounded for an object of any size. Passing faults are retried part by part. The room
//! never interprets the bytes.
//!
//! Each call blocks until it is done; none may be made on a thread of the runtime.

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

use crate::bounded::{self, MAX_FILE_BYTES};
use crate::net::SourceError;
use crate::shard::{Location, ShardUrl};
use crate::source::{ObjectReader, Sources};

pub use crate::s3::{ConditionalWrite, ObjectMeta, WriteCondition};

use bucket::Bucket;
use folder::{FileWriter, Folder};
use upload::Upload;

/// Object that a check writes and removes.
const PROBE: &str = ".coffey-check";

/// A folder or a prefix in S3 that objects are written to. Clones share it.
#[derive(Debug, Clone)]
pub struct Destination(Backend);

#[derive(Debug, Clone)]
enum Backend {
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

/// Size and hash of a written object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, in hexadecimal.
    pub sha256: String,
}

/// Sizes of uploads in parts; other sizes than the default are for tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartOptions {
    /// Size of the first parts. Bytes; at least 5 MiB on AWS. It doubles every 1,000 parts, so that the limit of 10,000
    /// parts holds the largest object of S3.
    pub bytes: usize,
    /// Parts in flight at once. One more part is held in memory.
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
    /// A destination: `s3://bucket/prefix/` (with or without the last `/`), else a folder, which is created with its
    /// first object. Touches no network.
    ///
    /// # Errors
    /// [`SourceError::Url`] or [`SourceError::Unsupported`] if the target can't be written to.
    pub fn destination(&self, target: &str, runtime: &Handle) -> Result<Destination, SourceError> {
        self.destination_with(target, runtime, PartOptions::default())
    }

    /// As [`Sources::destination`], with other sizes of parts.
    ///
    /// # Errors
    /// As [`Sources::destination`].
    pub fn destination_with(
        &self,
        target: &str,
        runtime: &Handle,
        parts: PartOptions,
    ) -> Result<Destination, SourceError> {
        let url: ShardUrl = if target.starts_with("s3://") && !target.ends_with('/') {
            format!("{target}/").parse()?
        } else if !target.contains("://") && !["", "-"].contains(&target) {
            ShardUrl::file(target)
        } else {
            target.parse()?
        };
        match url.location() {
            Location::File(path) => Ok(Destination::folder(path)),
            Location::S3 { bucket, key } => {
                let bucket = Bucket::new(self.clone(), runtime.clone(), bucket, key, parts);
                Ok(Destination(Backend::Bucket(Arc::new(bucket))))
            }
            Location::Http(_) | Location::Hub(_) | Location::Images(_) | Location::Stdin => {
                Err(SourceError::Unsupported {
                    url: url.to_string(),
                    cause: "can't be written to; name a folder or s3://bucket/prefix/".to_owned(),
                })
            }
        }
    }
}

impl Destination {
    /// A folder, which is created with its first object.
    #[must_use]
    pub fn folder(path: impl Into<PathBuf>) -> Self {
        Self(Backend::Folder(Folder::new(path.into())))
    }

    /// Starts an object. Names are relative, with `/` between folders.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be created.
    pub fn create(&self, name: &str) -> Result<ObjectWriter, SourceError> {
        self.create_with(name, BTreeMap::new())
    }

    /// Starts an object with metadata in S3: keys in lower case, values in ASCII. A folder drops the metadata.
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
            Backend::Folder(folder) => WriteTarget::File(folder.create(name)?),
            Backend::Bucket(bucket) => {
                WriteTarget::Upload(Box::new(Upload::new(Arc::clone(bucket), name, metadata)))
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

    /// Writes a whole object if it is in a certain state. A folder has no conditional writes.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be written.
    pub fn write_if(
        &self,
        name: &str,
        content: &[u8],
        condition: WriteCondition<'_>,
    ) -> Result<ConditionalWrite, SourceError> {
        self.check(name)?;
        match &self.0 {
            Backend::Folder(_) => Ok(ConditionalWrite::Unsupported),
            Backend::Bucket(bucket) => bucket.write_if(name, content, condition),
        }
    }

    /// Checks that objects can be written: writes one and removes it. Leaves nothing behind, and makes no folder.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be written.
    pub fn check_writable(&self) -> Result<(), SourceError> {
        match &self.0 {
            Backend::Folder(folder) => folder.check_writable(),
            Backend::Bucket(_) => {
                // A server may make a bucket for the object.
                self.list(PROBE)?;
                self.write(PROBE, b"")?;
                self.remove(PROBE)
            }
        }
    }

    /// The objects whose names begin with `below`, by name.
    ///
    /// # Errors
    /// [`SourceError`] if the destination can't be listed; a missing folder is empty.
    pub fn list(&self, below: &str) -> Result<Vec<Entry>, SourceError> {
        let mut entries = match &self.0 {
            Backend::Folder(folder) => folder.list(below)?,
            Backend::Bucket(bucket) => bucket.list(below)?,
        };
        entries.sort();
        Ok(entries)
    }

    /// Opens an object for reading.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] if there is none, else the error of the read.
    pub fn open(&self, name: &str) -> Result<ReadObject, SourceError> {
        self.check(name)?;
        match &self.0 {
            Backend::Folder(folder) => Ok(ReadObject(ReadFrom::File(folder.open(name)?))),
            Backend::Bucket(bucket) => Ok(ReadObject(ReadFrom::Object {
                reader: Box::new(bucket.open(name)?),
                runtime: bucket.runtime().clone(),
                chunk: Bytes::new(),
            })),
        }
    }

    /// Reads a whole object of at most [`MAX_FILE_BYTES`].
    ///
    /// # Errors
    /// As [`Destination::open`], and for a larger object.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        bounded::read(self.open(name)?, MAX_FILE_BYTES).map_err(|error| self.failed(name, error))
    }

    /// Size and metadata of an object; `None` if there is none.
    ///
    /// # Errors
    /// [`SourceError`] if the request fails.
    pub fn head(&self, name: &str) -> Result<Option<ObjectMeta>, SourceError> {
        self.check(name)?;
        match &self.0 {
            Backend::Folder(folder) => folder.head(name),
            Backend::Bucket(bucket) => bucket.head(name),
        }
    }

    /// Removes an object; a missing object is no error.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be removed.
    pub fn remove(&self, name: &str) -> Result<(), SourceError> {
        self.check(name)?;
        match &self.0 {
            Backend::Folder(folder) => folder.remove(name),
            Backend::Bucket(bucket) => bucket.remove(name),
        }
    }

    /// Removes what killed processes left: temporary files, and uploads that were neither completed nor aborted. `ours`
    /// selects them by the name of their object; the upload of a living process would be lost to it. Returns the number
    /// removed.
    ///
    /// # Errors
    /// [`SourceError`] if they can't be listed or removed. A server that does not list uploads counts as having none.
    pub fn abort_incomplete_uploads(
        &self,
        ours: impl Fn(&str) -> bool,
    ) -> Result<usize, SourceError> {
        match &self.0 {
            Backend::Folder(folder) => folder.abort_incomplete_uploads(ours),
            Backend::Bucket(bucket) => bucket.abort_incomplete_uploads(ours),
        }
    }

    /// Path or URL of an object, for messages.
    #[must_use]
    pub fn place(&self, name: &str) -> String {
        match &self.0 {
            Backend::Folder(folder) => folder.path(name).display().to_string(),
            Backend::Bucket(bucket) => bucket.target(name).url.to_string(),
        }
    }

    /// The [`SourceError`] inside an I/O error of an object, or one made of it.
    #[must_use]
    pub fn failed(&self, name: &str, error: io::Error) -> SourceError {
        error.downcast().unwrap_or_else(|error| SourceError::File {
            url: self.place(name),
            cause: error.to_string(),
        })
    }

    fn check(&self, name: &str) -> Result<(), SourceError> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if name.split('/').all(plain) {
            return Ok(());
        }
        Err(SourceError::Unsupported {
            url: format!("{self}{name}"),
            cause: format!("{name:?} names no object"),
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Backend::Folder(folder) => write!(f, "{}/", folder.root().display()),
            Backend::Bucket(bucket) => write!(f, "{}", bucket.target("").url),
        }
    }
}

/// An object that is being written. Dropped before [`ObjectWriter::finish`], it is discarded.
#[derive(Debug)]
pub struct ObjectWriter {
    target: WriteTarget,
    hash: Sha256,
    bytes: u64,
}

#[derive(Debug)]
enum WriteTarget {
    File(FileWriter),
    Upload(Box<Upload>),
}

impl ObjectWriter {
    /// Appends to the object; as [`Write`], but with a typed error.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be written; the object is discarded then.
    pub fn append(&mut self, content: &[u8]) -> Result<(), SourceError> {
        match &mut self.target {
            WriteTarget::File(file) => file.append(content)?,
            WriteTarget::Upload(upload) => upload.append(content)?,
        }
        self.hash.update(content);
        self.bytes += content.len() as u64;
        Ok(())
    }

    /// Makes the object visible, whole, and waits until it is stored.
    ///
    /// # Errors
    /// [`SourceError`] if it can't be stored; the object is discarded then.
    pub fn finish(self) -> Result<Written, SourceError> {
        match self.target {
            WriteTarget::File(file) => file.finish()?,
            WriteTarget::Upload(upload) => upload.finish()?,
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
pub struct ReadObject(ReadFrom);

#[derive(Debug)]
enum ReadFrom {
    File(std::fs::File),
    Object {
        reader: Box<ObjectReader>,
        runtime: Handle,
        chunk: Bytes,
    },
}

impl ReadObject {
    /// ETag of the object; `None` in a folder, or if the server gives none.
    #[must_use]
    pub fn etag(&self) -> Option<&str> {
        match &self.0 {
            ReadFrom::File(_) => None,
            ReadFrom::Object { reader, .. } => reader.etag(),
        }
    }
}

impl Read for ReadObject {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            ReadFrom::File(file) => file.read(into),
            ReadFrom::Object {
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
