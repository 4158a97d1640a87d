//! Local files.

use std::io::ErrorKind;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use crate::net::SourceError;
use crate::open_files::retry_async;
use crate::regular_file;
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
        ErrorKind::IsADirectory => SourceError::Unsupported {
            url,
            cause: "is a folder; end it with '/' to take every shard or image in it".to_owned(),
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
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || {
            let file = regular_file::open(&path)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        });
        let opened = opened.await.unwrap_or_else(|error| Err(error.into()));
        let (file, size) = opened.map_err(|error| failed(url, &error))?;
        Ok(Self {
            url: url.clone(),
            file: File::from_std(file),
            size,
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

/// The files and folders directly in a folder.
pub(crate) async fn list(url: &ShardUrl, folder: &Path) -> Result<Vec<ShardUrl>, SourceError> {
    let mut entries = retry_async(|| tokio::fs::read_dir(folder))
        .await
        .map_err(|error| failed(url, &error))?;
    let mut found = Vec::new();
    while let Some(entry) = entries
        .next_entry()
        .await
        .map_err(|error| failed(url, &error))?
    {
        found.push(ShardUrl::file(entry.path()));
    }
    Ok(found)
}
