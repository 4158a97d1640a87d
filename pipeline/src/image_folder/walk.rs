//! The files of a folder and its subfolders.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use super::names::{MemberKeys, MemberKind, bytes_of};
use super::passed_over::PassedOver;
use crate::net::SourceError;
use crate::shard::ShardUrl;

/// Folders that programs make beside images, for copies of other kinds: macOS's archives and Synology's thumbnails.
const IGNORED_FOLDERS: [&str; 2] = ["__MACOSX", "@eaDir"];

/// A file that is a member of a sample.
pub(super) struct File {
    /// Path in the folder.
    pub(super) path: Vec<u8>,
    key_bytes: usize,
    pub(super) kind: MemberKind,
}

impl File {
    pub(super) fn key(&self) -> &[u8] {
        &self.path[..self.key_bytes]
    }

    pub(super) fn extension(&self) -> &[u8] {
        &self.path[self.key_bytes + 1..]
    }
}

/// The files of a folder, in any order.
pub(super) struct Found {
    pub(super) files: Vec<File>,
    /// Metadata files, sorted.
    pub(super) metadata: Vec<PathBuf>,
    pub(super) passed_over: PassedOver,
}

/// Finds the members of samples in `root`. Links are followed; hidden files and folders are ignored.
pub(super) fn walk(root: &Path, keys: &MemberKeys) -> Result<Found, SourceError> {
    let mut found = Found {
        files: Vec::new(),
        metadata: Vec::new(),
        passed_over: PassedOver::default(),
    };
    let entries = WalkDir::new(root)
        .follow_links(true)
        .into_iter()
        .filter_entry(|entry| entry.depth() == 0 || !is_ignored(entry.file_name()));
    for entry in entries {
        match entry {
            // Opening a pipe would wait for its writer.
            Ok(entry) if entry.file_type().is_file() => found.add(root, keys, entry),
            Ok(_) => {}
            Err(error) => found.add_error(root, &error)?,
        }
    }
    found.metadata.sort_unstable();
    Ok(found)
}

fn is_ignored(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".") || IGNORED_FOLDERS.iter().any(|ignored| name == *ignored)
}

impl Found {
    fn add(&mut self, root: &Path, keys: &MemberKeys, entry: DirEntry) {
        let name = entry.file_name();
        if name == "metadata.jsonl" || name == "metadata.csv" {
            self.metadata.push(entry.into_path());
        } else if name == "metadata.parquet" {
            self.passed_over.parquet.get_or_insert(entry.into_path());
        } else {
            let path = entry.into_path();
            let inside = bytes_of(path.strip_prefix(root).unwrap_or(&path));
            if let Some((key_bytes, kind)) = keys.split(&inside) {
                self.files.push(File {
                    path: inside,
                    key_bytes,
                    kind,
                });
            } else if ShardUrl::file(&path).is_shard() {
                self.passed_over.shard.get_or_insert(path);
            } else {
                self.passed_over.others.add(|| path);
            }
        }
    }

    fn add_error(&mut self, root: &Path, error: &walkdir::Error) -> Result<(), SourceError> {
        let path = error.path().unwrap_or(root);
        let cause = error.io_error();
        let is_gone = cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound);
        if error.loop_ancestor().is_some() || (is_gone && path != root) {
            self.passed_over.links.add(|| path);
            return Ok(());
        }
        Err(SourceError::File {
            url: path.display().to_string(),
            cause: cause.map_or_else(|| error.to_string(), ToString::to_string),
        })
    }
}
