//! The checkpoints of a run, in a folder or under a prefix in S3: writing, listing, removing.

use std::fs;
use std::path::{Path, PathBuf};

use coffey_pipeline::Destination;

use super::atomic_dir::{UNFINISHED, write_dir_atomically};
use super::saved_run::{SavedRun, fetch, open};
use super::snapshot::{write_content, write_folder, write_state};
use super::{PREFIX, STATE, Snapshot, step_of};
use crate::adaptation::{ModelFolder, SAVED_FOLDERS};
use crate::train::{TrainError, io};

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
                    if step_of_file(&entry.name).is_some_and(|step| !steps.contains(&step)) {
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
    pub(in crate::train) fn finish(&self, student: &[ModelFolder]) -> Result<(), TrainError> {
        for model in student {
            match &self.location {
                CheckpointLocation::Folder(folder) => {
                    write_dir_atomically(&folder.join(&model.name), |unfinished| {
                        Ok(write_content(&Destination::folder(unfinished), model)?)
                    })?;
                }
                CheckpointLocation::Remote(destination, _) => {
                    write_folder(destination, "", model)?;
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
                    steps.extend(name.to_str().and_then(step_of));
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
fn step_of_file(name: &str) -> Option<u64> {
    step_of(name.split_once('/')?.0)
}

/// Steps of the checkpoints that have a `state.json`.
fn marked<'a>(names: impl Iterator<Item = &'a str>) -> Vec<u64> {
    names
        .filter(|name| name.ends_with(&format!("/{STATE}")))
        .filter_map(step_of_file)
        .collect()
}

/// Whether a run uploads an object of this name in parts.
fn is_ours(name: &str) -> bool {
    let folder = name.split_once('/').map(|(folder, _)| folder);
    step_of_file(name).is_some()
        || SAVED_FOLDERS.iter().any(|saved| folder == Some(saved.name))
        || name.ends_with(".jsonl") && folder.is_none()
}
