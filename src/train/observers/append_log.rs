//! A file of lines that only grows. Lines that the disk refuses stay in memory and are written with later lines.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::progress::Progress;
use crate::train::{TrainError, io};

/// The open file and the lines that are not in it yet.
#[derive(Debug)]
pub(super) struct AppendLog {
    path: PathBuf,
    file: File,
    /// Length of the file. Bytes.
    length: u64,
    /// Lines not written yet.
    pending: Vec<u8>,
}

impl AppendLog {
    /// Opens the file at `path` for appending; creates it if it is missing.
    pub(super) fn open(path: &Path) -> Result<Self, TrainError> {
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(io(path))?;
        let length = file.metadata().map_err(io(path))?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
            pending: Vec::new(),
        })
    }

    /// The file, for reading.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Truncates the file to `length` bytes.
    pub(super) fn truncate(&mut self, length: u64) -> Result<(), TrainError> {
        self.file.set_len(length).map_err(io(&self.path))?;
        self.length = length;
        Ok(())
    }

    /// Appends whole lines. Warns through `progress` when the disk begins to refuse them; they are written with later lines.
    pub(super) fn append(&mut self, lines: &[u8], progress: &Progress) {
        if let Some(error) = self.try_append(lines) {
            progress.say(format!(
                "warning: {error}; the lines are kept in memory and written when the disk takes them"
            ));
        }
    }

    /// The error, if it is the first one since lines could be written.
    fn try_append(&mut self, lines: &[u8]) -> Option<TrainError> {
        let failing = !self.pending.is_empty();
        self.pending.extend_from_slice(lines);
        self.flush().err().filter(|_| !failing)
    }

    fn flush(&mut self) -> Result<(), TrainError> {
        if let Err(error) = self.file.write_all(&self.pending) {
            // Removes a line written in part; the first error is the one to report.
            let _ = self.file.set_len(self.length);
            return Err(io(&self.path)(error));
        }
        self.length += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Waits until every line is on the disk.
    pub(super) fn sync(&mut self) -> Result<(), TrainError> {
        self.flush()?;
        self.file.sync_data().map_err(io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn append_log_writes_refused_lines_later_and_warns_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut log = AppendLog::open(&path).unwrap();
        assert!(log.try_append(b"one\n").is_none());
        // A file opened for reading refuses writes as a full disk does.
        let writable = std::mem::replace(&mut log.file, File::open(&path).unwrap());
        assert!(log.try_append(b"two\n").is_some());
        assert!(log.try_append(b"three\n").is_none(), "already reported");
        assert!(log.sync().is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\n");
        log.file = writable;
        assert!(log.try_append(b"four\n").is_none());
        log.sync().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "one\ntwo\nthree\nfour\n");
        log.file = File::open(&path).unwrap();
        assert!(log.try_append(b"five\n").is_some(), "a new failure");
    }
}
