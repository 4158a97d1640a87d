//! Local files.

use std::io::ErrorKind;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::net::SourceError;
use crate::shard::ShardUrl;

const CHUNK_BYTES: usize = 256 << 10;

pub(super) fn failed(url: &ShardUrl, error: &std::io::Error) -> SourceError {
    let url = url.to_string();
    let home = url.starts_with("~/");
    match error.kind() {
        ErrorKind::NotFound => SourceError::NotFound {
            url,
            cause: "no such file or folder".to_owned(),
            hint: if home {
                "; \"~\" is not expanded, write the path in full"
            } else {
                " and the folder this runs in"
            },
        },
        ErrorKind::PermissionDenied => SourceError::Forbidden {
            url,
            cause: error.to_string(),
            hint: "check who may read it",
        },
        _ => SourceError::File {
            url,
            cause: error.to_string(),
        },
    }
}

/// A file being read.
#[derive(Debug)]
pub(crate) struct LocalReader {
    url: ShardUrl,
    file: File,
    size: u64,
    offset: u64,
}

impl LocalReader {
    pub(crate) async fn open(url: &ShardUrl, path: &Path) -> Result<Self, SourceError> {
        let file = File::open(path)
            .await
            .map_err(|error| failed(url, &error))?;
        let metadata = file.metadata().await.map_err(|error| failed(url, &error))?;
        if metadata.is_dir() {
            return Err(SourceError::Unsupported {
                url: url.to_string(),
                cause: "is a folder; end it with '/' to take every shard in it".to_owned(),
            });
        }
        Ok(Self {
            url: url.clone(),
            file,
            size: metadata.len(),
            offset: 0,
        })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        let read = self
            .file
            .read_buf(&mut chunk)
            .await
            .map_err(|error| failed(&self.url, &error))?;
        self.offset += read as u64;
        if read == 0 {
            return Ok(None);
        }
        Ok(Some(chunk.freeze()))
    }
}

/// The shards directly in a folder.
pub(crate) async fn list(url: &ShardUrl, folder: &Path) -> Result<Vec<ShardUrl>, SourceError> {
    let mut entries = tokio::fs::read_dir(folder)
        .await
        .map_err(|error| failed(url, &error))?;
    let mut found = Vec::new();
    while let Some(entry) = entries
        .next_entry()
        .await
        .map_err(|error| failed(url, &error))?
    {
        let shard = ShardUrl::file(entry.path());
        if shard.is_shard() {
            found.push(shard);
        }
    }
    Ok(found)
}
