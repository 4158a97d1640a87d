//! Checkpoints: `checkpoint-N/` holds the student, the target, the optimiser and the place in the data, whole or not at all.
//!
//! A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed; `state.json` carries the
//! checksum of every other file. Old checkpoints go only after the new one stands.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use coffey_pipeline::order::Cursor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::optimizer::AdamW;
use super::{Student, TrainError, io};

/// Counts up when an older coffey could not read what is written.
const FORMAT: u32 = 2;
const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";
/// Folders that are being filled.
const ASIDE: &str = ".writing-";

/// What every version of [`State`] begins with.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// What a checkpoint holds besides tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    format: u32,
    /// Steps made.
    pub(super) step: u64,
    /// Samples trained on.
    pub(super) samples: u64,
    /// The place in the stream after the last batch of that step.
    pub(super) cursor: Cursor,
    /// The run's configuration.
    pub(super) configuration: String,
    /// SHA-256 of every other file, by its path in the checkpoint.
    checksums: BTreeMap<String, String>,
}

/// A whole checkpoint: its folder and its state.
pub(super) type Found = (PathBuf, State);

/// A run's checkpoints.
#[derive(Debug)]
pub(super) struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    pub(super) fn new(folder: &Path, keep: usize) -> Self {
        Self {
            folder: folder.to_owned(),
            keep: keep.max(1),
        }
    }

    /// Removes what a killed run left half written.
    pub(super) fn clear_unfinished(&self) -> Result<(), TrainError> {
        for entry in fs::read_dir(&self.folder).map_err(io(&self.folder))? {
            let entry = entry.map_err(io(&self.folder))?;
            if entry.file_name().to_string_lossy().starts_with(ASIDE) {
                fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
            }
        }
        Ok(())
    }

    /// Writes the checkpoint of a step, then removes the oldest beyond those to keep.
    pub(super) fn save(
        &self,
        (step, samples): (u64, u64),
        student: &Student,
        optimizer: &AdamW,
        cursor: &Cursor,
        configuration: &str,
    ) -> Result<PathBuf, TrainError> {
        let place = self.folder.join(format!("{PREFIX}{step}"));
        write_aside(&place, |aside| {
            student.save_online(&aside.join("unet"))?;
            student.save_target(&aside.join("unet_target"))?;
            optimizer.save(&aside.join(OPTIMIZER))?;
            let mut checksums = BTreeMap::new();
            for file in files_below(aside)? {
                checksums.insert(relative(aside, &file), checksum(&file)?);
            }
            let state = State {
                format: FORMAT,
                step,
                samples,
                cursor: cursor.clone(),
                configuration: configuration.to_owned(),
                checksums,
            };
            let path = aside.join(STATE);
            let json = serde_json::to_vec_pretty(&state).map_err(|e| io(&path)(e.into()))?;
            fs::write(&path, json).map_err(io(&path))
        })?;
        self.prune(step)?;
        Ok(place)
    }

    /// Every checkpoint's step, ascending.
    pub(super) fn steps(&self) -> Result<Vec<u64>, TrainError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io(&self.folder))?,
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(io(&self.folder))?.file_name();
            steps.extend(
                name.to_str()
                    .and_then(|n| n.strip_prefix(PREFIX))
                    .and_then(|n| n.parse::<u64>().ok()),
            );
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint that is whole, and for each newer one what is wrong with it.
    pub(super) fn newest_whole(&self) -> Result<(Option<Found>, Vec<TrainError>), TrainError> {
        let mut damaged = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            let path = self.folder.join(format!("{PREFIX}{step}"));
            match open(&path) {
                Ok(state) => return Ok((Some((path, state)), damaged)),
                Err(error @ TrainError::CheckpointFormat { .. }) => return Err(error),
                Err(error) => damaged.push(error),
            }
        }
        Ok((None, damaged))
    }

    /// Removes the oldest checkpoints up to `newest`, which was just written. Later ones, left by a run that went on from
    /// an earlier place, are not counted: they may be damaged.
    fn prune(&self, newest: u64) -> Result<(), TrainError> {
        let mut steps = self.steps()?;
        steps.retain(|&step| step <= newest);
        for step in &steps[..steps.len().saturating_sub(self.keep)] {
            let path = self.folder.join(format!("{PREFIX}{step}"));
            fs::remove_dir_all(&path).map_err(io(&path))?;
        }
        Ok(())
    }
}

/// Reads a checkpoint's state and checks every file against its checksum.
pub(super) fn open(path: &Path) -> Result<State, TrainError> {
    let damaged = |message: String| TrainError::Checkpoint {
        path: path.to_owned(),
        message: format!("damaged checkpoint: {message}"),
    };
    let text =
        fs::read_to_string(path.join(STATE)).map_err(|e| damaged(format!("{STATE}: {e}")))?;
    let unreadable = |e: serde_json::Error| damaged(format!("{STATE}: {e}"));
    let Format { format } = serde_json::from_str(&text).map_err(unreadable)?;
    if format != FORMAT {
        return Err(TrainError::CheckpointFormat {
            path: path.to_owned(),
            found: format,
            reads: FORMAT,
        });
    }
    let state: State = serde_json::from_str(&text).map_err(unreadable)?;
    for (name, expected) in &state.checksums {
        let found = checksum(&path.join(name)).map_err(|e| damaged(e.to_string()))?;
        if found != *expected {
            return Err(damaged(format!(
                "{name} does not have the checksum it was written with"
            )));
        }
    }
    Ok(state)
}

/// Restores the optimiser's state from a checkpoint.
pub(super) fn load_optimizer(
    path: &Path,
    state: &State,
    optimizer: &mut AdamW,
    device: &candle_core::Device,
) -> Result<(), TrainError> {
    optimizer.load(&path.join(OPTIMIZER), state.step, device)
}

/// Fills a folder under a hidden name beside `place`, flushes it and renames it there, replacing what stood there.
pub(super) fn write_aside(
    place: &Path,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let aside = tempfile::Builder::new()
        .prefix(ASIDE)
        .tempdir_in(parent)
        .map_err(io(parent))?;
    let content = aside.path().join("content");
    fs::create_dir(&content).map_err(io(&content))?;
    fill(&content)?;
    for path in files_below(&content)? {
        File::open(&path)
            .and_then(|f| f.sync_all())
            .map_err(io(&path))?;
        let folder = path.parent().unwrap_or(&content);
        File::open(folder)
            .and_then(|f| f.sync_all())
            .map_err(io(folder))?;
    }
    put_in_place(&content, place, aside.path()).map_err(io(place))?;
    File::open(parent)
        .and_then(|f| f.sync_all())
        .map_err(io(parent))
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

fn files_below(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        match path.is_dir() {
            true => files.extend(files_below(&path)?),
            false => files.push(path),
        }
    }
    files.sort();
    Ok(files)
}

fn relative(folder: &Path, file: &Path) -> String {
    file.strip_prefix(folder)
        .unwrap_or(file)
        .to_string_lossy()
        .into_owned()
}

fn checksum(path: &Path) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(io(path))?;
    std::io::copy(&mut file, &mut hash).map_err(io(path))?;
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
