//! The lock of a folder: a file that its holder keeps locked.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::HumanDuration;

use super::{LOCK, LockWait, held};
use crate::process::host_name;
use crate::train::{TrainError, io};

/// Time between two looks at a lock that another process holds.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest text that is read of it. Bytes.
const MOST_TEXT: u64 = 300;

/// A folder that is locked by this process until the value is dropped. Dropped, it removes folders that it made and that are
/// empty but for the lock.
#[derive(Debug)]
pub(in crate::train) struct FolderLock {
    folder: PathBuf,
    /// Folders that were made for the run, the innermost first.
    made: Vec<PathBuf>,
    file: File,
}

impl FolderLock {
    /// Creates the folder if it is missing, locks it and says who holds it. Messages name the output by `place`.
    pub(in crate::train) fn acquire(
        folder: &Path,
        place: &Path,
        wait: LockWait<'_>,
    ) -> Result<Self, TrainError> {
        let missing = folder.ancestors().take_while(|folder| {
            !folder.as_os_str().is_empty() && fs::symlink_metadata(folder).is_err()
        });
        let made = missing.map(Path::to_owned).collect();
        fs::create_dir_all(folder).map_err(io(folder))?;
        let path = folder.join(LOCK);
        let begun = Instant::now();
        let file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(io(&path))?;
            let mut file = file;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) if wait.wait(PAUSE, begun)? => continue,
                locked => check(locked, &mut file, &path, place)?,
            }
            if is_at(&file, &path) {
                break file;
            }
            // The run that held it removed it between the two calls.
        };
        let lock = Self {
            folder: folder.to_owned(),
            made,
            file,
        };
        lock.write_holder().map_err(io(&path))?;
        Ok(lock)
    }

    /// Fails if another process holds the lock of a folder; changes nothing.
    pub(in crate::train) fn check_free(folder: &Path, place: &Path) -> Result<(), TrainError> {
        let path = folder.join(LOCK);
        match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            opened => {
                let mut file = opened.map_err(io(&path))?;
                check(file.try_lock(), &mut file, &path, place)
            }
        }
    }

    fn write_holder(&self) -> std::io::Result<()> {
        let (id, host) = (std::process::id(), host_name());
        let mut file = &self.file;
        file.set_len(0)?;
        writeln!(file, "pid {id} on host {host}")
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return;
        };
        let is_lock = |entry: std::io::Result<fs::DirEntry>| {
            entry.is_ok_and(|entry| entry.file_name() == LOCK)
        };
        if entries.into_iter().all(is_lock) {
            // What can't be removed does no harm.
            fs::remove_file(self.folder.join(LOCK)).ok();
            let _ = self.made.iter().try_for_each(fs::remove_dir);
        }
    }
}

/// Whether the open file is the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let opened = file.metadata().map(identity).ok();
    opened.is_some() && opened == fs::metadata(path).map(identity).ok()
}

/// What an attempt to lock a file has given; an error names the holder.
fn check(
    locked: Result<(), TryLockError>,
    file: &mut File,
    path: &Path,
    place: &Path,
) -> Result<(), TrainError> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(held(place, &holder(file))),
        Err(TryLockError::Error(source)) => Err(io(path)(source)),
    }
}

/// The process that holds a lock and for how long, in brackets; empty if the file does not say.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(MOST_TEXT).read_to_string(&mut text));
    let since = file.metadata().and_then(|metadata| metadata.modified());
    let age = since.ok().and_then(|since| since.elapsed().ok());
    match (read, text.lines().next(), age) {
        (Ok(_), Some(holder), Some(age)) => {
            format!(" ({holder}, for {})", HumanDuration(age))
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn acquire(folder: &Path, limit: Duration) -> Result<FolderLock, TrainError> {
        let wait = LockWait {
            limit,
            cancel: &CancellationToken::new(),
            say: &|_| (),
        };
        FolderLock::acquire(folder, folder, wait)
    }

    #[test]
    fn lock_that_is_released_in_time_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let held = acquire(root.path(), Duration::ZERO).unwrap();
        let released = std::thread::spawn(move || {
            std::thread::sleep(3 * PAUSE);
            drop(held);
        });
        acquire(root.path(), Duration::from_secs(60)).unwrap();
        released.join().unwrap();
    }

    #[test]
    fn lock_names_its_holder_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        let held = acquire(&folder, Duration::ZERO).unwrap();
        let pid = format!("(pid {} on host ", std::process::id());
        for refused in [
            acquire(&folder, Duration::ZERO).map(drop),
            FolderLock::check_free(&folder, &folder),
        ] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains(&pid), "{message}");
            assert!(message.contains("second"), "{message}");
        }
        drop(held);
        assert_eq!(root.path().read_dir().unwrap().count(), 0);
        FolderLock::check_free(&folder, &folder).unwrap();
    }

    #[test]
    fn lock_keeps_folders_that_hold_files() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        let held = acquire(&folder, Duration::ZERO).unwrap();
        fs::write(folder.join("metrics.jsonl"), "").unwrap();
        drop(held);
        let mut left: Vec<_> = folder
            .read_dir()
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, [LOCK, "metrics.jsonl"]);
        acquire(&folder, Duration::ZERO).unwrap();
        let empty = root.path().join("empty");
        fs::create_dir(&empty).unwrap();
        drop(acquire(&empty, Duration::ZERO).unwrap());
        assert!(empty.is_dir(), "it was there before");
    }
}
