//! Files that appear whole or not at all: written aside in the same folder, synced, renamed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use super::LatentError;

/// Where `target` is written before it is whole.
pub(super) fn aside_path(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.tmp"))
}

/// A file that is not yet under its name; dropping it removes it.
#[derive(Debug)]
pub(super) struct Aside {
    file: File,
    path: TempPath,
    target: PathBuf,
}

impl Aside {
    /// Begins the file that will be `target`.
    pub(super) fn create(target: &Path) -> Result<Self, LatentError> {
        let path = aside_path(target);
        let file = File::create(&path).map_err(LatentError::io(&path))?;
        Ok(Self {
            file,
            path: TempPath::try_from_path(&path).map_err(LatentError::io(&path))?,
            target: target.to_owned(),
        })
    }

    /// Puts it under its name, once it is on the disk.
    pub(super) fn commit(self) -> Result<(), LatentError> {
        self.file
            .sync_all()
            .map_err(LatentError::io(&self.target))?;
        self.path
            .persist(&self.target)
            .map_err(|error| LatentError::io(&self.target)(error.error))?;
        // The rename itself is only sure once the folder is on the disk too.
        let folder = self.target.parent().unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(LatentError::io(folder))
    }
}

impl Write for Aside {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Replaces `target` by `bytes`.
pub(super) fn replace(target: &Path, bytes: &[u8]) -> Result<(), LatentError> {
    let mut aside = Aside::create(target)?;
    aside.write_all(bytes).map_err(LatentError::io(target))?;
    aside.commit()
}

/// Removes what a killed run left of `target`.
pub(super) fn remove_leftover(target: &Path) -> Result<(), LatentError> {
    let path = aside_path(target);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(LatentError::io(&path)(error)),
        _ => Ok(()),
    }
}
