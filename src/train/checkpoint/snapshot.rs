//! Snapshots: the training state at one step, as a checkpoint is written from it.

use std::io;

use candle_core::{Result, Tensor};
use coffey_pipeline::{Destination, SourceError};
use serde_json::{Map, Value};

use super::{CheckpointState, OPTIMIZER, RunIdentity, STATE};
use crate::adaptation::ModelFolder;
use crate::device;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{config_text, model_metadata, write_safetensors};
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
    pub(in crate::train) fn of(state: &TrainState, run: &RunIdentity) -> Option<Self> {
        Some(Self {
            folders: state.student.folders(),
            optimizer: state.optimizer.state().into_iter().collect(),
            state: CheckpointState::new(state, run)?,
        })
    }

    /// A copy in main memory, which training does not change.
    pub(in crate::train) fn copied(self) -> Result<Self> {
        let copy_all = |tensors: Tensors| -> Result<Tensors> {
            let (names, tensors): (Vec<String>, Vec<Tensor>) = tensors.into_iter().unzip();
            Ok(names.into_iter().zip(device::copies(&tensors)?).collect())
        };
        let folders = self.folders.into_iter().map(|folder| {
            Ok(ModelFolder {
                tensors: copy_all(folder.tensors)?,
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
            let place = format!("{below}{}/", folder.name);
            let written = write_model(destination, &place, &folder.config, &folder.tensors)?;
            for (name, checksum) in written {
                note(&format!("{}/{name}", folder.name), checksum);
            }
        }
        let name = format!("{below}{OPTIMIZER}");
        let checksum = write_tensors(destination, &name, &self.optimizer, None)?;
        note(OPTIMIZER, checksum);
        Ok(state)
    }

    /// The models in diffusers layout.
    pub(super) fn folders(&self) -> &[ModelFolder] {
        &self.folders
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

/// Writes a model in diffusers layout, under names that begin with `below`. Returns the checksum of each file by the rest of its
/// name. `config.json` is written last: a folder with it is whole.
pub(in crate::train) fn write_model(
    destination: &Destination,
    below: &str,
    config: &Map<String, Value>,
    tensors: &Tensors,
) -> std::result::Result<[(String, String); 2], SourceError> {
    let weights = format!("{WEIGHTS_STEM}.safetensors");
    let metadata = Some(model_metadata());
    let name = format!("{below}{weights}");
    let weights = (
        weights,
        write_tensors(destination, &name, tensors, metadata)?,
    );
    let name = format!("{below}config.json");
    let config = destination.write(&name, config_text(config).as_bytes())?;
    Ok([weights, ("config.json".to_owned(), config.sha256)])
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
