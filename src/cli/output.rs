//! Checks that the output of a command can be written, made before anything is loaded.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

use coffey_pipeline::ShardUrl;
use coffey_pipeline::pack::is_within;

use super::Failure;
use super::resources::DataAccess;
use crate::config::in_s3;
use crate::draw::check_png;

/// Refuses an output in a folder of images among `shards`: its pictures would be images of the next start.
pub(super) fn check_apart(key: &str, place: &Path, shards: &[ShardUrl]) -> Result<(), Failure> {
    let folders: BTreeSet<&Path> = shards.iter().filter_map(ShardUrl::image_folder).collect();
    for folder in folders {
        if !in_s3(place) && is_within(place, folder)? {
            let message = format!(
                "{key} = {:?} is in the folder of images {}: name a folder outside it",
                place.display().to_string(),
                folder.display()
            );
            return Err(Failure::Usage(message.into()));
        }
    }
    Ok(())
}

/// Writes to the output that `key` names, and removes what was written.
pub(super) fn check_writable(key: &str, place: &Path, data: &DataAccess) -> Result<(), Failure> {
    let runtime = data.runtime.handle();
    let destination = data
        .sources
        .destination(&place.to_string_lossy(), runtime)?;
    destination.check_writable().map_err(|error| {
        if in_s3(place) {
            // The server's error names the prefix. It is a failure, not a mistake in the file.
            return error.into();
        }
        Failure::Usage(format!("{key} can't be written: {error}").into())
    })
}

/// Refuses a URL: `option` takes a local file or folder, as `takes` says.
pub(super) fn check_local(option: &str, path: &Path, takes: &str) -> Result<(), Failure> {
    let path = path.to_string_lossy();
    match path.contains("://") {
        true => Err(Failure::Usage(
            format!("{option} {path}: {option} takes {takes}, not a URL").into(),
        )),
        false => Ok(()),
    }
}

/// Checks that the picture that `option` names can be written; writes nothing.
pub(super) fn check_picture(option: &str, path: &Path) -> Result<(), Failure> {
    check_local(option, path, "a local file")?;
    let is_png = |extension: &OsStr| extension.eq_ignore_ascii_case("png");
    if !path.extension().is_some_and(is_png) {
        let message = format!("{option} {}: must be a .png file", path.display());
        return Err(Failure::Usage(message.into()));
    }
    check_png(path).map_err(|error| Failure::Usage(format!("{option}: {error}").into()))
}
