//! Snapshots: the training state at one step, as a checkpoint is written from it.

use std::io;

use candle_core::{Result, Tensor};
use coffey_pipeline::{Destination, SourceError};

use super::{CheckpointState, OPTIMIZER, RunIdentity, STATE};
use crate::adaptation::{ModelFolder, TensorFile};
use crate::device;
use crate::models::{FileContents, config_text, write_safetensors};
use crate::params::Tensors;
use crate::train::{TrainError, TrainState};

/// A training state at one step, as it is written.
#[derive(Debug)]
pub(in crate::train) struct Snapshot {
    folders: Vec<ModelFolder>,
    optimizer: Tensors,
    pub(super) state: CheckpointState,
}

impl Snapshot {
    /// The state as it is now; `None` before the first step. Its tensors share the storage of those that are trained: see
    /// [`Snapshot::copied`].
    pub(in crate::train) fn of(state: &TrainState, run: &RunIdentity) -> Result<Option<Self>> {
        let Some(described) = CheckpointState::new(state, run) else {
            return Ok(None);
        };
        Ok(Some(Self {
            folders: state.student.checkpoint()?,
            optimizer: state.optimizer.state(),
            state: described,
        }))
    }

    /// A copy in main memory, which training does not change.
    pub(in crate::train) fn copied(self) -> Result<Self> {
        let copy_all = |tensors: Tensors| -> Result<Tensors> {
            let (names, tensors): (Vec<String>, Vec<Tensor>) = tensors.into_iter().unzip();
            Ok(names.into_iter().zip(device::copies(&tensors)?).collect())
        };
        let copy_file = |file: TensorFile| {
            let FileContents { tensors, metadata } = file.contents;
            let contents = FileContents {
                tensors: copy_all(tensors)?,
                metadata,
            };
            Ok(TensorFile { contents, ..file })
        };
        let folders = self.folders.into_iter().map(|folder| {
            Ok(ModelFolder {
                files: folder
                    .files
                    .into_iter()
                    .map(copy_file)
                    .collect::<Result<_>>()?,
                ..folder
            })
        });
        Ok(Self {
            folders: folders.collect::<Result<_>>()?,
            optimizer: copy_all(self.optimizer)?,
            state: self.state,
        })
    }

    /// The step of the state.
    pub(in crate::train) fn step(&self) -> u64 {
        self.state.step
    }

    /// Writes every file but `state.json`, under names that begin with `below`. Returns the state with their checksums.
    pub(super) fn write(
        &self,
        destination: &Destination,
        below: &str,
    ) -> std::result::Result<CheckpointState, TrainError> {
        let mut state = self.state.clone();
        let mut note = |name: &str, checksum: String| {
            state.checksums.insert(name.to_owned(), checksum);
        };
        for folder in &self.folders {
            for (name, checksum) in write_folder(destination, below, folder)? {
                note(&name, checksum);
            }
        }
        let name = format!("{below}{OPTIMIZER}");
        let checksum = write_tensors(destination, &name, &self.optimizer, None)?;
        note(OPTIMIZER, checksum);
        Ok(state)
    }
}

/// Writes `state.json`, which completes a checkpoint.
pub(super) fn write_state(
    destination: &Destination,
    below: &str,
    state: &CheckpointState,
) -> std::result::Result<(), TrainError> {
    let name = format!("{below}{STATE}");
    let text = state
        .to_text()
        .map_err(|error| destination.failed(&name, io::Error::from(error)))?;
    destination.write(&name, &text)?;
    Ok(())
}

/// Writes a folder with its name, under names that begin with `below`. Returns the checksum of each file by the rest of its name.
/// `config.json` is written last: a folder with it is whole.
pub(in crate::train) fn write_folder(
    destination: &Destination,
    below: &str,
    folder: &ModelFolder,
) -> std::result::Result<Vec<(String, String)>, SourceError> {
    let name = |file: &str| match folder.name.as_str() {
        "" => file.to_owned(),
        folder => format!("{folder}/{file}"),
    };
    write_files(destination, below, folder, name)
}

/// As [`write_folder`], without the folder's own name.
pub(super) fn write_content(
    destination: &Destination,
    folder: &ModelFolder,
) -> std::result::Result<(), SourceError> {
    write_files(destination, "", folder, str::to_owned)?;
    Ok(())
}

fn write_files(
    destination: &Destination,
    below: &str,
    folder: &ModelFolder,
    name: impl Fn(&str) -> String,
) -> std::result::Result<Vec<(String, String)>, SourceError> {
    let mut written = Vec::new();
    for file in &folder.files {
        let name = name(&file.name);
        let FileContents { tensors, metadata } = &file.contents;
        let (place, metadata) = (format!("{below}{name}"), Some(metadata.clone()));
        written.push((name, write_tensors(destination, &place, tensors, metadata)?));
    }
    if let Some(config) = &folder.config {
        let name = name("config.json");
        let text = config_text(config);
        let config = destination.write(&format!("{below}{name}"), text.as_bytes())?;
        written.push((name, config.sha256));
    }
    Ok(written)
}

fn write_tensors(
    destination: &Destination,
    name: &str,
    tensors: &Tensors,
    metadata: Option<std::collections::HashMap<String, String>>,
) -> std::result::Result<String, SourceError> {
    let mut writer = destination.create(name)?;
    let named = tensors.iter().map(|(name, t)| (name.as_str(), t));
    write_safetensors(&mut writer, named, metadata).map_err(|e| destination.failed(name, e))?;
    Ok(writer.finish()?.sha256)
}
