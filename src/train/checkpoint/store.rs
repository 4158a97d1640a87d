//! The checkpoints of a run, in a folder or under a prefix in S3: writing, listing, verifying, removing.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{Destination, SourceError};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::atomic_dir::{UNFINISHED, write_dir_atomically};
use super::snapshot::{write_model, write_state};
use super::{CheckpointState, PREFIX, STATE, Snapshot, damaged, not_as_written};
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

/// A run's checkpoints.
#[derive(Debug)]
pub(in crate::train) struct CheckpointStore {
    location: CheckpointLocation,
    keep: usize,
}

#[derive(Debug)]
enum CheckpointLocation {
    Folder(PathBuf),
    /// A prefix in S3, and the folder that checkpoints are fetched into.
    Remote(Destination, PathBuf),
}

impl CheckpointStore {
    /// Checkpoints in a folder.
    pub(in crate::train) fn in_folder(folder: &Path, keep: usize) -> Self {
        Self {
            location: CheckpointLocation::Folder(folder.to_owned()),
            keep: keep.max(1),
        }
    }

    /// Checkpoints under a prefix in S3, fetched into `scratch` for reading.
    pub(in crate::train) fn remote(destination: Destination, scratch: &Path, keep: usize) -> Self {
        Self {
            location: CheckpointLocation::Remote(destination, scratch.to_owned()),
            keep: keep.max(1),
        }
    }

    /// Removes unfinished checkpoints that a killed run left.
    pub(in crate::train) fn clear_unfinished(&self) -> Result<(), TrainError> {
        match &self.location {
            CheckpointLocation::Folder(folder) => {
                for entry in fs::read_dir(folder).map_err(io(folder))? {
                    let entry = entry.map_err(io(folder))?;
                    if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                        fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
                    }
                }
            }
            CheckpointLocation::Remote(destination, _) => {
                destination.abort_incomplete_uploads(is_ours)?;
                let entries = destination.list(PREFIX)?;
                let steps = marked(entries.iter().map(|entry| entry.name.as_str()));
                for entry in &entries {
                    if step_of(&entry.name).is_some_and(|step| !steps.contains(&step)) {
                        destination.remove(&entry.name)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes a checkpoint and returns its place. In S3 `before` runs when every file but `state.json` is written.
    pub(in crate::train) fn save(
        &self,
        snapshot: &Snapshot,
        before: impl FnOnce() -> Result<(), TrainError>,
    ) -> Result<String, TrainError> {
        let name = format!("{PREFIX}{}", snapshot.step());
        match &self.location {
            CheckpointLocation::Folder(folder) => {
                let place = folder.join(name);
                write_dir_atomically(&place, |unfinished| {
                    let unfinished = Destination::folder(unfinished);
                    let state = snapshot.write(&unfinished, "")?;
                    write_state(&unfinished, "", &state)
                })?;
                Ok(place.display().to_string())
            }
            CheckpointLocation::Remote(destination, _) => {
                let below = format!("{name}/");
                // A checkpoint of this name, left by a run that resumed from an earlier step, is invalid from now on.
                destination.remove(&format!("{below}{STATE}"))?;
                let state = snapshot.write(destination, &below)?;
                before()?;
                write_state(destination, &below, &state)?;
                Ok(destination.place(&name))
            }
        }
    }

    /// Writes the finished student beside the checkpoints.
    pub(in crate::train) fn finish(&self, snapshot: &Snapshot) -> Result<(), TrainError> {
        for model in snapshot.folders() {
            let (config, tensors) = (&model.config, &model.tensors);
            match &self.location {
                CheckpointLocation::Folder(folder) => {
                    write_dir_atomically(&folder.join(model.name), |unfinished| {
                        write_model(&Destination::folder(unfinished), "", config, tensors)?;
                        Ok(())
                    })?;
                }
                CheckpointLocation::Remote(destination, _) => {
                    write_model(destination, &format!("{}/", model.name), config, tensors)?;
                }
            }
        }
        Ok(())
    }

    /// Every checkpoint's step, ascending.
    pub(in crate::train) fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let mut steps = match &self.location {
            CheckpointLocation::Folder(folder) => {
                let entries = match fs::read_dir(folder) {
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                    entries => entries.map_err(io(folder))?,
                };
                let mut steps = Vec::new();
                for entry in entries {
                    let name = entry.map_err(io(folder))?.file_name();
                    steps.extend(name.to_str().and_then(|name| step_of(&format!("{name}/"))));
                }
                steps
            }
            CheckpointLocation::Remote(destination, _) => {
                let entries = destination.list(PREFIX)?;
                marked(entries.iter().map(|entry| entry.name.as_str()))
            }
        };
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest undamaged checkpoint, and the fault of each newer one.
    pub(in crate::train) fn newest_whole(
        &self,
    ) -> Result<(Option<SavedRun>, Vec<TrainError>), TrainError> {
        let mut wrong = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let name = format!("{PREFIX}{step}");
            let found = match &self.location {
                CheckpointLocation::Folder(folder) => open(&folder.join(name)),
                CheckpointLocation::Remote(destination, scratch) => {
                    fetch(destination, &name, scratch)
                }
            };
            match found {
                Ok(found) => return Ok((Some(found), wrong)),
                Err(error @ TrainError::Checkpoint { .. }) => wrong.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok((None, wrong))
    }

    /// Removes the oldest checkpoints up to `newest`, which was just written. Later checkpoints, left by a run that resumed from
    /// an earlier step, are not counted: they may be damaged.
    pub(in crate::train) fn prune(&self, newest: u64) -> Result<(), TrainError> {
        let mut steps = self.steps()?;
        steps.retain(|&step| step <= newest);
        for step in &steps[..steps.len().saturating_sub(self.keep)] {
            let name = format!("{PREFIX}{step}");
            match &self.location {
                CheckpointLocation::Folder(folder) => {
                    let path = folder.join(name);
                    fs::remove_dir_all(&path).map_err(io(&path))?;
                }
                CheckpointLocation::Remote(destination, _) => {
                    // Without state.json it is no checkpoint, whatever else remains.
                    destination.remove(&format!("{name}/{STATE}"))?;
                    for entry in destination.list(&format!("{name}/"))? {
                        destination.remove(&entry.name)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Step of the checkpoint that a file belongs to.
fn step_of(name: &str) -> Option<u64> {
    let (step, _) = name.strip_prefix(PREFIX)?.split_once('/')?;
    step.parse().ok()
}

/// Steps of the checkpoints that have a `state.json`.
fn marked<'a>(names: impl Iterator<Item = &'a str>) -> Vec<u64> {
    names
        .filter(|name| name.ends_with(&format!("/{STATE}")))
        .filter_map(step_of)
        .collect()
}

/// Whether a run uploads an object of this name in parts.
fn is_ours(name: &str) -> bool {
    let finished = ["unet/", "unet_target/"];
    step_of(name).is_some()
        || finished.iter().any(|folder| name.starts_with(folder))
        || name.ends_with(".jsonl") && !name.contains('/')
}

/// Reads the state of the checkpoint in `path` and verifies every file against its checksum.
pub(in crate::train) fn open(path: &Path) -> Result<SavedRun, TrainError> {
    let place = path.display().to_string();
    let text = bounded::read_file(&path.join(STATE), MAX_FILE_BYTES)
        .map_err(|e| damaged(&place, format!("{STATE}: {e}")))?;
    let state = CheckpointState::read(&place, &text)?;
    for (name, expected) in &state.checksums {
        let path = path.join(name);
        let found = File::open(&path)
            .and_then(|mut file| copy(&mut file, &mut std::io::sink()))
            .map_err(|e| damaged(&place, format!("{name}: {e}")))?;
        if found != *expected {
            return Err(not_as_written(&place, name));
        }
    }
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
    let state = CheckpointState::read(&place, &text)?;
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
        if found != *expected {
            return Err(not_as_written(&place, file));
        }
    }
    Ok(SavedRun {
        place,
        folder: fetched.path().to_owned(),
        state,
        _fetched: Some(fetched),
    })
}

/// Copies to the end. Returns the SHA-256 of the bytes.
fn copy(from: &mut impl Read, to: &mut impl Write) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut piece)?;
        if read == 0 {
            let digest = hash.finalize();
            return Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&piece[..read]);
        to.write_all(&piece[..read])?;
    }
}
