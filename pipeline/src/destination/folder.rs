//! Objects as files, written atomically: to a temporary file, flushed to disk, renamed.

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{Entry, ObjectMeta};
use crate::net::SourceError;
use crate::open_files::retry;
use crate::regular_file;

/// Prefix of the names of temporary files.
const TEMPORARY: &str = ".writing-";
/// Random characters at the end of such a name.
const RANDOM: usize = 6;
const BUFFER: usize = 1 << 20;
/// Size of the file that a check writes: a block, which a full disk refuses.
const PROBE_BYTES: usize = 4096;

#[derive(Debug, Clone)]
pub(super) struct Folder(PathBuf);

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> SourceError {
    let url = path.display().to_string();
    move |error| match error.kind() {
        ErrorKind::NotFound => SourceError::NotFound {
            url,
            cause: error.to_string(),
            hint: "",
        },
        kind => SourceError::File {
            url,
            cause: match advice(kind) {
                Some(advice) => format!("{error}; {advice}"),
                None => error.to_string(),
            },
        },
    }
}

/// The action that helps after an error of the system.
fn advice(kind: ErrorKind) -> Option<&'static str> {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some("free some space there"),
        ErrorKind::FileTooLarge => Some("raise the limit on the size of files (ulimit -f)"),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            Some("make it writable for this user")
        }
        _ => None,
    }
}

/// The name of the object that a temporary file becomes.
fn object_name(file: &str) -> Option<&str> {
    let name = file.strip_prefix(TEMPORARY)?;
    let name = name.get(..name.len().checked_sub(RANDOM)?)?;
    name.strip_suffix('-')
}

impl Folder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn root(&self) -> &Path {
        &self.0
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(super) fn create(&self, name: &str) -> Result<FileWriter, SourceError> {
        let target = self.path(name);
        let parent = target.parent().unwrap_or(&self.0).to_owned();
        fs::create_dir_all(&parent).map_err(failed(&parent))?;
        let file = name.rsplit('/').next().unwrap_or(name);
        let prefix = format!("{TEMPORARY}{file}-");
        let create = || {
            tempfile::Builder::new()
                .prefix(&prefix)
                .rand_bytes(RANDOM)
                .permissions(Permissions::from_mode(0o666)) // less the umask
                .tempfile_in(&parent)
        };
        let temporary = retry(create).map_err(failed(&target))?;
        Ok(FileWriter {
            file: BufWriter::with_capacity(BUFFER, temporary),
            target,
            parent,
        })
    }

    /// Writes a file in the folder, or in the nearest folder above it that is there, and removes it.
    pub(super) fn check_writable(&self) -> Result<(), SourceError> {
        let path = std::path::absolute(&self.0).map_err(failed(&self.0))?;
        let folder = nearest(&path)?;
        if !folder.is_dir() {
            return Err(SourceError::File {
                url: folder.display().to_string(),
                cause: "is not a folder; name another one, or move it away".to_owned(),
            });
        }
        retry(|| tempfile::tempfile_in(folder))
            .and_then(|mut file| {
                file.write_all(&[0; PROBE_BYTES])?;
                file.sync_data()
            })
            .map_err(failed(folder))
    }

    /// Visits each file, temporary files included.
    fn walk(
        &self,
        visit: &mut impl FnMut(String, &Path) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut folders = vec![(self.0.clone(), String::new())];
        while let Some((folder, prefix)) = folders.pop() {
            let entries = match retry(|| fs::read_dir(&folder)) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                entries => entries.map_err(failed(&folder))?,
            };
            for entry in entries {
                let entry = entry.map_err(failed(&folder))?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                if entry.file_type().map_err(failed(&entry.path()))?.is_dir() {
                    folders.push((entry.path(), format!("{name}/")));
                } else {
                    visit(name, &entry.path())?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn list(&self, below: &str) -> Result<Vec<Entry>, SourceError> {
        let mut entries = Vec::new();
        self.walk(&mut |name, path| {
            let file = name.rsplit('/').next().unwrap_or(&name);
            if name.starts_with(below) && object_name(file).is_none() {
                let size = match fs::metadata(path) {
                    // Removed since the folder was read, such as a temporary file of another process.
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    found => found.map_err(failed(path))?.len(),
                };
                entries.push(Entry { name, size });
            }
            Ok(())
        })?;
        Ok(entries)
    }

    pub(super) fn open(&self, name: &str) -> Result<File, SourceError> {
        let path = self.path(name);
        regular_file::open(&path).map_err(failed(&path))
    }

    pub(super) fn head(&self, name: &str) -> Result<Option<ObjectMeta>, SourceError> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => Ok(Some(ObjectMeta {
                size: found.map_err(failed(&path))?.len(),
                metadata: std::collections::BTreeMap::new(),
            })),
        }
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), SourceError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(failed(&path)),
        }
    }

    pub(super) fn abort_incomplete_uploads(
        &self,
        ours: impl Fn(&str) -> bool,
    ) -> Result<usize, SourceError> {
        let mut count = 0;
        self.walk(&mut |name, path| {
            let (folder, file) = match name.rfind('/') {
                Some(at) => name.split_at(at + 1),
                None => ("", name.as_str()),
            };
            if object_name(file).is_some_and(|object| ours(&format!("{folder}{object}"))) {
                fs::remove_file(path).map_err(failed(path))?;
                count += 1;
            }
            Ok(())
        })?;
        Ok(count)
    }
}

/// The path or the nearest one above it that is there.
fn nearest(path: &Path) -> Result<&Path, SourceError> {
    for path in path.ancestors() {
        match fs::symlink_metadata(path) {
            Ok(_) => return Ok(path),
            Err(error)
                if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {}
            Err(error) => return Err(failed(path)(error)),
        }
    }
    Ok(Path::new("/"))
}

/// A temporary file that is being written; removed on drop.
#[derive(Debug)]
pub(super) struct FileWriter {
    file: BufWriter<NamedTempFile>,
    target: PathBuf,
    parent: PathBuf,
}

impl FileWriter {
    pub(super) fn append(&mut self, content: &[u8]) -> Result<(), SourceError> {
        self.file.write_all(content).map_err(failed(&self.target))
    }

    pub(super) fn finish(self) -> Result<(), SourceError> {
        let Self {
            mut file,
            target,
            parent,
        } = self;
        file.flush().map_err(failed(&target))?;
        // The buffer is empty after the flush.
        let (temporary, _) = file.into_parts();
        temporary.as_file().sync_all().map_err(failed(&target))?;
        temporary
            .persist(&target)
            .map_err(|error| match error.error.kind() {
                ErrorKind::NotFound => SourceError::File {
                    url: target.display().to_string(),
                    cause: "another process that writes it cleared away what this one wrote"
                        .to_owned(),
                },
                _ => failed(&target)(error.error),
            })?;
        retry(|| File::open(&parent))
            .and_then(|folder| folder.sync_all())
            .map_err(failed(&parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_checked_without_a_trace() {
        let root = tempfile::tempdir().unwrap();
        let check = |path: &str| Folder::new(root.path().join(path)).check_writable();
        check("a/b/c").unwrap();
        check("").unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        fs::write(root.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("nothing", root.path().join("link")).unwrap();
        for (path, named) in [
            ("file", "file"),
            ("file/below/it", "file"),
            ("link/x", "link"),
        ] {
            let error = check(path).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{named}: is not a folder")),
                "{error}"
            );
        }
    }

    #[test]
    fn folder_temporary_file_names_its_object() {
        let folder = tempfile::tempdir().unwrap();
        let writer = Folder::new(folder.path().to_owned());
        let file = writer.create("a/b-c.txt").unwrap();
        let files: Vec<_> = fs::read_dir(folder.path().join("a"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(files.len(), 1);
        assert_eq!(object_name(&files[0]), Some("b-c.txt"), "{files:?}");
        assert_eq!(object_name("b-c.txt"), None);
        assert_eq!(object_name(".writing-é"), None);
        drop(file);
        assert_eq!(fs::read_dir(folder.path().join("a")).unwrap().count(), 0);
    }
}
