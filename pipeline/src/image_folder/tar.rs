//! The tar that stands for a shard of a folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::PoisonError;

use serde_json::Value;

use super::names::{MemberKind, encoded, path_of};
use super::passed_over::UnreadFiles;
use super::{ImageFolder, Member, Unread};
use crate::net::SourceError;
use crate::regular_file;
use crate::shard::member_header;

/// A file being read, exactly as long as it was when it was opened.
struct Content {
    file: File,
    left: u64,
    failure: Option<io::Error>,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let length = buffer.len().min(most);
        let failure = match self.file.read(&mut buffer[..length]) {
            Ok(0) if length > 0 => io::Error::other("became shorter while it was read"),
            Ok(read) => {
                self.left -= read as u64;
                return Ok(read);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => error,
        };
        let kind = failure.kind();
        self.failure = Some(failure);
        Err(kind.into())
    }
}

impl ImageFolder {
    /// Writes the tar of `samples` to `out`. Its bytes depend only on names and contents. Ends early if `out` takes no more.
    ///
    /// An image that is not there or must not be read becomes an empty member, so that the positions of samples stay;
    /// other such members are left out. Returns the description of these files, if there are any.
    ///
    /// # Errors
    /// [`SourceError::File`] for any other fault of a file.
    pub(crate) fn write_tar(
        &self,
        samples: Range<usize>,
        out: impl Write,
    ) -> Result<Option<String>, SourceError> {
        let mut tar = TarWriter(tar::Builder::new(out));
        let (mut unread, mut tables) = (UnreadFiles::default(), BTreeMap::new());
        for sample in samples {
            let (mut key, mut has_caption, mut has_json) = (String::new(), false, false);
            for member in self.members(sample) {
                key = encoded(member.key);
                has_caption |= member.kind == MemberKind::Caption;
                has_json |= member.kind == MemberKind::Json;
                let path = path_of(&self.root, member.path);
                let opened =
                    regular_file::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
                let added = match opened {
                    Ok((size, file)) => tar.append_file(&key, &member, size, file),
                    Err(error) if is_missing(&error) => {
                        unread.add(path.display(), &error);
                        self.remember(sample, &path, &error);
                        match member.kind {
                            MemberKind::Image => Ok(tar.append(&key, &member.extension, &[])),
                            MemberKind::Caption | MemberKind::Json => Ok(true),
                        }
                    }
                    Err(error) => Err(error),
                };
                let added = added.map_err(|error| SourceError::File {
                    url: path.display().to_string(),
                    cause: error.to_string(),
                });
                if !added? {
                    return Ok(None);
                }
            }
            if has_caption && has_json {
                continue;
            }
            for (extension, content) in self.metadata_members(sample, &mut tables)? {
                let is_there = if extension == "json" {
                    has_json
                } else {
                    has_caption
                };
                if !is_there && !tar.append(&key, &extension, content.as_bytes()) {
                    return Ok(None);
                }
            }
        }
        // The reader needs no end of the archive if it has gone.
        tar.0.finish().ok();
        Ok(unread.describe())
    }

    /// Remembers a file that can't be opened.
    fn remember(&self, sample: usize, path: &Path, error: &io::Error) {
        let why = Unread {
            is_gone: error.kind() == ErrorKind::NotFound,
            cause: error.to_string(),
        };
        let unread = self.unread.lock();
        let mut unread = unread.unwrap_or_else(PoisonError::into_inner);
        unread.insert((sample, path.to_owned()), why);
    }

    /// Members that the metadata has for a sample, with their extensions.
    fn metadata_members(
        &self,
        sample: usize,
        files: &mut BTreeMap<usize, File>,
    ) -> Result<Vec<(String, String)>, SourceError> {
        let Some(Some(row)) = self.rows.get(sample) else {
            return Ok(Vec::new());
        };
        let table = &self.metadata[row.table];
        let file = match files.entry(row.table) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let file = regular_file::open(&table.path).map_err(|error| SourceError::File {
                    url: table.path.display().to_string(),
                    cause: error.to_string(),
                })?;
                entry.insert(file)
            }
        };
        let row = table.row(file, &row.range)?;
        let caption = self
            .keys
            .captions
            .iter()
            .find_map(|key| match row.get(key) {
                Some(Value::String(text)) => Some((key.clone(), text)),
                _ => None,
            });
        let json = ("json".to_owned(), row.text().to_owned());
        Ok(caption.into_iter().chain([json]).collect())
    }
}

/// Whether the file is not there or must not be read, as opposed to a fault of the disk.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::NotADirectory
    )
}

struct TarWriter<W: Write>(tar::Builder<W>);

impl<W: Write> TarWriter<W> {
    /// Appends a member; `false` if the output takes no more.
    fn append(&mut self, key: &str, extension: &str, content: &[u8]) -> bool {
        let mut header = member_header(content.len() as u64);
        let path = format!("{key}.{extension}");
        self.0.append_data(&mut header, path, content).is_ok()
    }

    /// Appends a file as [`TarWriter::append`] does.
    ///
    /// # Errors
    /// The fault of the file.
    fn append_file(
        &mut self,
        key: &str,
        member: &Member<'_>,
        size: u64,
        file: File,
    ) -> io::Result<bool> {
        let mut content = Content {
            file,
            left: size,
            failure: None,
        };
        let path = format!("{key}.{}", member.extension);
        let added = self
            .0
            .append_data(&mut member_header(size), path, &mut content);
        match content.failure {
            Some(failure) => Err(failure),
            None => Ok(added.is_ok()),
        }
    }
}
