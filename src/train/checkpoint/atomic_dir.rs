//! Atomic writes of whole folders.

use std::fs::{self, File};
use std::path::Path;

use coffey_pipeline::open_files::retry;

use crate::train::{TrainError, io};

/// Prefix of the names of folders that are being written.
pub(super) const UNFINISHED: &str = ".writing-";

/// Fills a folder under a hidden name beside `place`, flushes it and renames it to `place`, replacing what was there. `fill` flushes
/// the files it writes.
pub(super) fn write_dir_atomically<T>(
    place: &Path,
    fill: impl FnOnce(&Path) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let unfinished = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(parent)
        .map_err(io(parent))?;
    let content = unfinished.path().join("content");
    fs::create_dir(&content).map_err(io(&content))?;
    let filled = fill(&content)?;
    let flush = |folder: &Path| {
        let flushed = retry(|| File::open(folder)).and_then(|f| f.sync_all());
        flushed.map_err(io(folder))
    };
    flush(&content)?;
    put_in_place(&content, place, unfinished.path()).map_err(io(place))?;
    flush(parent)?;
    Ok(filled)
}

/// Renames `content` to `place`. An existing folder is exchanged with it in one system call, so that one of the two is always
/// there.
fn put_in_place(content: &Path, place: &Path, unfinished: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    if !place.exists() {
        return fs::rename(content, place);
    }
    match renameat_with(CWD, content, CWD, place, RenameFlags::EXCHANGE) {
        // The old folder is removed with the hidden folder.
        Ok(()) => Ok(()),
        Err(_) => {
            fs::rename(place, unfinished.join("old"))?;
            fs::rename(content, place)
        }
    }
}
