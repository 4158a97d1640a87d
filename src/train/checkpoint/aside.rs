//! Folders that appear whole.

use std::fs::{self, File};
use std::path::Path;

use crate::train::{TrainError, io};

/// Start of the names of folders that are being filled.
pub(super) const ASIDE: &str = ".writing-";

/// Fills a folder under a hidden name beside `place`, flushes it and renames it there, replacing what stood there. The files in
/// it are flushed by whoever writes them.
pub(super) fn write_aside<T>(
    place: &Path,
    fill: impl FnOnce(&Path) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let aside = tempfile::Builder::new()
        .prefix(ASIDE)
        .tempdir_in(parent)
        .map_err(io(parent))?;
    let content = aside.path().join("content");
    fs::create_dir(&content).map_err(io(&content))?;
    let filled = fill(&content)?;
    let flush = |folder: &Path| {
        let flushed = File::open(folder).and_then(|f| f.sync_all());
        flushed.map_err(io(folder))
    };
    flush(&content)?;
    put_in_place(&content, place, aside.path()).map_err(io(place))?;
    flush(parent)?;
    Ok(filled)
}

/// Renames `content` to `place`. What stood there changes places with it in one step, so that one of them always stands.
fn put_in_place(content: &Path, place: &Path, aside: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    if !place.exists() {
        return fs::rename(content, place);
    }
    match renameat_with(CWD, content, CWD, place, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()), // the old one goes with the folder it was exchanged into
        Err(_unsupported) => {
            fs::rename(place, aside.join("old"))?;
            fs::rename(content, place)
        }
    }
}
