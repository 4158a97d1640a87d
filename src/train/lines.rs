//! A file of lines that only grows, whatever the disk says: what it refuses is kept and tried again.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{TrainError, io};

/// The open file.
#[derive(Debug)]
pub(super) struct Lines {
    path: PathBuf,
    file: File,
    /// Bytes that are in the file.
    length: u64,
    /// Lines that are not.
    pending: Vec<u8>,
    /// Why not, until someone asks.
    trouble: Option<TrainError>,
}

impl Lines {
    /// Goes on with the file at `path`, which is made if it is not there.
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
            trouble: None,
        })
    }

    /// The file, for reading.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Cuts the file off.
    pub(super) fn cut(&mut self, length: u64) -> Result<(), TrainError> {
        self.file.set_len(length).map_err(io(&self.path))?;
        self.length = length;
        Ok(())
    }

    /// Appends whole lines. What can't be written now is tried again with the next ones.
    pub(super) fn append(&mut self, lines: &[u8]) {
        let again = !self.pending.is_empty();
        self.pending.extend_from_slice(lines);
        if let Err(error) = self.flush()
            && !again
        {
            self.trouble = Some(error);
        }
    }

    fn flush(&mut self) -> Result<(), TrainError> {
        if let Err(error) = self.file.write_all(&self.pending) {
            // No half line is left in the file.
            let _as_long_as_it_was = self.file.set_len(self.length);
            return Err(io(&self.path)(error));
        }
        self.length += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Why lines can't be written, once for each time that begins.
    pub(super) fn trouble(&mut self) -> Option<TrainError> {
        self.trouble.take()
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
    fn what_is_refused_is_written_later_and_said_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut lines = Lines::open(&path).unwrap();
        lines.append(b"one\n");
        // A file that is open for reading alone refuses like a full disk.
        let writable = std::mem::replace(&mut lines.file, File::open(&path).unwrap());
        lines.append(b"two\n");
        assert!(lines.trouble().is_some());
        lines.append(b"three\n");
        assert!(lines.trouble().is_none());
        assert!(lines.sync().is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\n");
        lines.file = writable;
        lines.append(b"four\n");
        lines.sync().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "one\ntwo\nthree\nfour\n");
        lines.file = File::open(&path).unwrap();
        lines.append(b"five\n");
        assert!(lines.trouble().is_some(), "it began again");
    }
}
