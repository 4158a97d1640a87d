//! Whether the output of a command can be written, asked before anything is loaded.

use std::path::Path;

use super::Failure;
use super::resources::DataAccess;
use crate::config::in_s3;

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
