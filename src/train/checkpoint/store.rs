//! Where a run's checkpoints are, how one comes to stand there, and which is the newest that is whole.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use coffey_pipeline::{Destination, SourceError};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::aside::{ASIDE, write_aside};
use super::snapshot::{write_model, write_state};
use super::{PREFIX, STATE, Snapshot, State, damaged, not_as_written};
use crate::train::{TrainError, io};

/// A whole checkpoint.
#[derive(Debug)]
pub(in crate::train) struct Found {
    /// Where it stands, for messages.
    pub(in crate::train) place: String,
    /// The folder to read it from: its own, or that which it was fetched into.
    pub(in crate::train) folder: PathBuf,
    pub(in crate::train) state: State,
    /// Removed when it has been read.
    _fetched: Option<TempDir>,
}

/// A run's checkpoints.
#[derive(Debug)]
pub(in crate::train) struct Checkpoints {
    place: Place,
    keep: usize,
}

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    /// A prefix in S3, and the folder that checkpoints are fetched into.
    Remote(Destination, PathBuf),
}

impl Checkpoints {
    /// Those in a folder.
    pub(in crate::train) fn in_folder(folder: &Path, keep: usize) -> Self {
        Self {
            place: Place::Folder(folder.to_owned()),
            keep: keep.max(1),
        }
    }

    /// Those under a prefix in S3.
    pub(in crate::train) fn remote(destination: Destination, scratch: &Path, keep: usize) -> Self {
        Self {
            place: Place::Remote(destination, scratch.to_owned()),
            keep: keep.max(1),
        }
    }

    /// Removes what a killed run left half written.
    pub(in crate::train) fn clear_unfinished(&self) -> Result<(), TrainError> {
        match &self.place {
            Place::Folder(folder) => {
                for entry in fs::read_dir(folder).map_err(io(folder))? {
                    let entry = entry.map_err(io(folder))?;
                    if entry.file_name().to_string_lossy().starts_with(ASIDE) {
                        fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
                    }
                }
            }
            Place::Remote(destination, _) => {
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

    /// Writes the checkpoint of a step; where it stands. In S3 `before` is done when all of it but `state.json` is there.
    pub(in crate::train) fn save(
        &self,
        snapshot: &Snapshot,
        before: impl FnOnce() -> Result<(), TrainError>,
    ) -> Result<String, TrainError> {
        let name = format!("{PREFIX}{}", snapshot.step());
        match &self.place {
            Place::Folder(folder) => {
                let place = folder.join(name);
                write_aside(&place, |aside| {
                    let aside = Destination::folder(aside);
                    let state = snapshot.write(&aside, "")?;
                    write_state(&aside, "", &state)
                })?;
                Ok(place.display().to_string())
            }
            Place::Remote(destination, _) => {
                let below = format!("{name}/");
                // What stands there under this name, as of a run that went on from an earlier place, is none from now on.
                destination.remove(&format!("{below}{STATE}"))?;
                let state = snapshot.write(destination, &below)?;
                before()?;
                write_state(destination, &below, &state)?;
                Ok(destination.place(&name))
            }
        }
    }

    /// Writes the finished student, and its moving average beside it.
    pub(in crate::train) fn finish(&self, snapshot: &Snapshot) -> Result<(), TrainError> {
        snapshot.write_finished(|name, config, tensors| match &self.place {
            Place::Folder(folder) => write_aside(&folder.join(name), |aside| {
                write_model(&Destination::folder(aside), "", config, tensors)?;
                Ok(())
            }),
            Place::Remote(destination, _) => {
                write_model(destination, &format!("{name}/"), config, tensors)?;
                Ok(())
            }
        })
    }

    /// Every checkpoint's step, ascending.
    pub(in crate::train) fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let mut steps = match &self.place {
            Place::Folder(folder) => {
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
            Place::Remote(destination, _) => {
                let entries = destination.list(PREFIX)?;
                marked(entries.iter().map(|entry| entry.name.as_str()))
            }
        };
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint that is whole, and for each newer one what is wrong with it.
    pub(in crate::train) fn newest_whole(
        &self,
    ) -> Result<(Option<Found>, Vec<TrainError>), TrainError> {
        let mut wrong = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let name = format!("{PREFIX}{step}");
            let found = match &self.place {
                Place::Folder(folder) => open(&folder.join(name)),
                Place::Remote(destination, scratch) => fetch(destination, &name, scratch),
            };
            match found {
                Ok(found) => return Ok((Some(found), wrong)),
                Err(error @ TrainError::Checkpoint { .. }) => wrong.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok((None, wrong))
    }

    /// Removes the oldest checkpoints up to `newest`, which was just written. Later ones, left by a run that went on from
    /// an earlier place, are not counted: they may be damaged.
    pub(in crate::train) fn prune(&self, newest: u64) -> Result<(), TrainError> {
        let mut steps = self.steps()?;
        steps.retain(|&step| step <= newest);
        for step in &steps[..steps.len().saturating_sub(self.keep)] {
            let name = format!("{PREFIX}{step}");
            match &self.place {
                Place::Folder(folder) => {
                    let path = folder.join(name);
                    fs::remove_dir_all(&path).map_err(io(&path))?;
                }
                Place::Remote(destination, _) => {
                    // First what makes a checkpoint of it.
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

/// The step of the checkpoint that a file is in.
fn step_of(name: &str) -> Option<u64> {
    let (step, _) = name.strip_prefix(PREFIX)?.split_once('/')?;
    step.parse().ok()
}

/// The steps of checkpoints that have their `state.json`.
fn marked<'a>(names: impl Iterator<Item = &'a str>) -> Vec<u64> {
    names
        .filter(|name| name.ends_with(&format!("/{STATE}")))
        .filter_map(step_of)
        .collect()
}

/// Whether an object under a run's prefix is one that a run writes in parts.
fn is_ours(name: &str) -> bool {
    let finished = ["unet/", "unet_target/"];
    step_of(name).is_some()
        || finished.iter().any(|folder| name.starts_with(folder))
        || name.ends_with(".jsonl") && !name.contains('/')
}

/// Reads a checkpoint's state and checks every file against its checksum.
pub(in crate::train) fn open(path: &Path) -> Result<Found, TrainError> {
    let place = path.display().to_string();
    let text = fs::read(path.join(STATE)).map_err(|e| damaged(&place, format!("{STATE}: {e}")))?;
    let state = State::read(&place, &text)?;
    for (name, expected) in &state.checksums {
        let path = path.join(name);
        let found = File::open(&path)
            .and_then(|mut file| copy(&mut file, &mut std::io::sink()))
            .map_err(|e| damaged(&place, format!("{name}: {e}")))?;
        if found != *expected {
            return Err(not_as_written(&place, name));
        }
    }
    Ok(Found {
        place,
        folder: path.to_owned(),
        state,
        _fetched: None,
    })
}

/// Fetches the checkpoint `name` into a folder of its own below `scratch`, checking every file against its checksum.
pub(in crate::train) fn fetch(
    destination: &Destination,
    name: &str,
    scratch: &Path,
) -> Result<Found, TrainError> {
    let place = destination.place(name);
    let broken = |file: &str, error: SourceError| match error {
        SourceError::NotFound { .. } => damaged(&place, format!("{file} is missing")),
        error => TrainError::Source(error),
    };
    let text = destination
        .read(&format!("{name}/{STATE}"))
        .map_err(|e| broken(STATE, e))?;
    let state = State::read(&place, &text)?;
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
    Ok(Found {
        place,
        folder: fetched.path().to_owned(),
        state,
        _fetched: Some(fetched),
    })
}

/// Copies to the end; the SHA-256 of what was copied.
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
