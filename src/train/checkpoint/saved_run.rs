//! Reading a checkpoint: its files are those that were written, or it is refused as damaged.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{Destination, SourceError, regular_file};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::{CheckpointState, OPTIMIZER, STATE, damaged};
use crate::adaptation::{SavedFolder, saved_folders};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{choose_weights, file_names};
use crate::train::{TrainError, io};

/// A checkpoint whose files all have their checksums.
#[derive(Debug)]
pub(in crate::train) struct SavedRun {
    /// Where the checkpoint is, for messages.
    pub(in crate::train) place: String,
    /// Folder to read from: the checkpoint's own, or the one it was fetched into.
    pub(in crate::train) folder: PathBuf,
    pub(in crate::train) state: CheckpointState,
    /// Removed on drop.
    _fetched: Option<TempDir>,
}

/// Reads the state of the checkpoint in `path` and verifies every file against its checksum.
pub(in crate::train) fn open(path: &Path) -> Result<SavedRun, TrainError> {
    let place = path.display().to_string();
    let broken = |file: &str| {
        let (place, file) = (place.clone(), file.to_owned());
        move |error: io::Error| damaged(&place, format!("{file}: {error}"))
    };
    let text = bounded::read_file(&path.join(STATE), MAX_FILE_BYTES).map_err(broken(STATE))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let state = CheckpointState::read(&place, &name, &text)?;
    check_files(&place, &state)?;
    let root = fs::canonicalize(path).map_err(io(path))?;
    for (name, expected) in &state.checksums {
        let path = fs::canonicalize(path.join(name)).map_err(broken(name))?;
        if !path.starts_with(&root) {
            let message = format!(
                "{name} is a link out of the checkpoint, to {}",
                path.display()
            );
            return Err(damaged(&place, message));
        }
        let found = regular_file::open(&path)
            .and_then(|mut file| copy(&mut file, &mut io::sink()))
            .map_err(broken(name))?;
        check_sum(&place, name, &found, expected)?;
    }
    check_weights(&place, path, &state)?;
    Ok(SavedRun {
        place,
        folder: path.to_owned(),
        state,
        _fetched: None,
    })
}

/// Fetches the checkpoint `name` into a new folder below `scratch` and verifies every file against its checksum.
pub(in crate::train) fn fetch(
    destination: &Destination,
    name: &str,
    scratch: &Path,
) -> Result<SavedRun, TrainError> {
    let place = destination.place(name);
    let broken = |file: &str, error: SourceError| match error {
        SourceError::NotFound { .. } => damaged(&place, format!("{file} is missing")),
        error => TrainError::Source(error),
    };
    let text = destination
        .read(&format!("{name}/{STATE}"))
        .map_err(|e| broken(STATE, e))?;
    let state = CheckpointState::read(&place, name, &text)?;
    check_files(&place, &state)?;
    let fetched = tempfile::Builder::new()
        .prefix(".fetched-")
        .tempdir_in(scratch)
        .map_err(io(scratch))?;
    for (file, expected) in &state.checksums {
        let path = fetched.path().join(file);
        let folder = path.parent().unwrap_or(fetched.path());
        fs::create_dir_all(folder).map_err(io(folder))?;
        let object = format!("{name}/{file}");
        let mut from = destination.open(&object).map_err(|e| broken(file, e))?;
        let mut to = File::create(&path).map_err(io(&path))?;
        let found =
            copy(&mut from, &mut to).map_err(|error| match error.downcast::<SourceError>() {
                Ok(error) => broken(file, error),
                Err(error) => io(&path)(error),
            })?;
        check_sum(&place, file, &found, expected)?;
    }
    Ok(SavedRun {
        place,
        folder: fetched.path().to_owned(),
        state,
        _fetched: Some(fetched),
    })
}

/// Refuses checksums with a name outside the checkpoint, or without one of a file that is loaded.
fn check_files(place: &str, state: &CheckpointState) -> Result<(), TrainError> {
    for name in state.checksums.keys() {
        let mut parts = Path::new(name).components();
        if name.is_empty() || !parts.all(|part| matches!(part, Component::Normal(_))) {
            let message = format!("{STATE}: {name:?} in checksums is no path in the checkpoint");
            return Err(damaged(place, message));
        }
    }
    let models = folders(state).iter().flat_map(|folder| {
        let files = folder.files.iter();
        files.map(|file| format!("{}/{file}", folder.name))
    });
    let mut loaded = models.chain([OPTIMIZER.to_owned()]);
    match loaded.find(|name| !state.checksums.contains_key(name)) {
        None => Ok(()),
        Some(name) => Err(damaged(place, format!("{STATE}: checksums lacks {name}"))),
    }
}

fn check_sum(place: &str, name: &str, found: &str, expected: &str) -> Result<(), TrainError> {
    if found == expected {
        return Ok(());
    }
    let message = format!("{name} does not have the checksum it was written with");
    Err(damaged(place, message))
}

/// Refuses a file that would be loaded in place of one with a checksum.
fn check_weights(place: &str, path: &Path, state: &CheckpointState) -> Result<(), TrainError> {
    for SavedFolder { name, files } in folders(state) {
        let names: BTreeSet<String> = file_names(&path.join(name));
        let Ok(chosen) = choose_weights(WEIGHTS_STEM, &names).map(|file| file.name) else {
            continue;
        };
        if !files.contains(&chosen.as_str()) {
            let own = files.last().unwrap_or(&"");
            let message = format!("{name}/{chosen} would be loaded in place of {own}; remove it");
            return Err(damaged(place, message));
        }
    }
    Ok(())
}

/// The folders that a checkpoint holds its student in.
fn folders(state: &CheckpointState) -> &'static [SavedFolder] {
    saved_folders(state.checksums.keys().map(String::as_str))
}

/// Copies to the end. Returns the SHA-256 of the bytes.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut piece)?;
        if read == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(&piece[..read]);
        to.write_all(&piece[..read])?;
    }
}
