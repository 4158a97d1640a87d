//! What a checkpoint is written from: the run at one step, while the run itself may go on.

use std::collections::BTreeMap;
use std::io;

use candle_core::{Device, Result, Tensor};
use coffey_pipeline::{Destination, SourceError};
use serde_json::{Map, Value};

use super::{OPTIMIZER, STATE, State};
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{config_text, model_metadata, write_safetensors};
use crate::train::optimizer::AdamW;
use crate::train::{Student, TrainError};

type Tensors = BTreeMap<String, Tensor>;

/// A run at one step.
#[derive(Debug)]
pub(in crate::train) struct Snapshot {
    model: Map<String, Value>,
    online: Tensors,
    target: Tensors,
    optimizer: Tensors,
    pub(super) state: State,
}

impl Snapshot {
    /// Takes one. With `copied`, of everything into main memory, so that training can go on; otherwise it shows whatever the
    /// tensors hold when it is written.
    pub(in crate::train) fn take(
        student: &Student,
        optimizer: &AdamW,
        state: State,
        copied: bool,
    ) -> Result<Self> {
        let copy = |tensor: Tensor| match (copied, tensor.device()) {
            (false, _) => Ok(tensor),
            (true, Device::Cpu) => tensor.copy(),
            (true, _) => tensor.to_device(&Device::Cpu),
        };
        let all = |tensors: Tensors| -> Result<Tensors> {
            let copies = tensors.into_iter();
            copies.map(|(name, t)| Ok((name, copy(t)?))).collect()
        };
        Ok(Self {
            model: student.unet().config().to_json().clone(),
            online: all(student.online())?,
            target: all(student.average())?,
            optimizer: all(optimizer.state().into_iter().collect())?,
            state,
        })
    }

    /// Memory that a copy takes. Bytes.
    pub(in crate::train) fn bytes(student: &Student, optimizer: &AdamW) -> u64 {
        let size = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let models: u64 = [student.online(), student.average()]
            .iter()
            .flat_map(BTreeMap::values)
            .map(size)
            .sum();
        models + optimizer.state().iter().map(|(_, t)| size(t)).sum::<u64>()
    }

    /// The step it is of.
    pub(in crate::train) fn step(&self) -> u64 {
        self.state.step
    }

    /// Writes every file but `state.json`, under names that begin with `below`; the state with their checksums.
    pub(super) fn write(
        &self,
        destination: &Destination,
        below: &str,
    ) -> std::result::Result<State, TrainError> {
        let mut state = self.state.clone();
        let mut note = |name: &str, checksum: String| {
            state.checksums.insert(name.to_owned(), checksum);
        };
        for (folder, tensors) in [("unet", &self.online), ("unet_target", &self.target)] {
            let place = format!("{below}{folder}/");
            for (name, checksum) in write_model(destination, &place, &self.model, tensors)? {
                note(&format!("{folder}/{name}"), checksum);
            }
        }
        let name = format!("{below}{OPTIMIZER}");
        note(
            OPTIMIZER,
            write_tensors(destination, &name, &self.optimizer, None)?,
        );
        Ok(state)
    }

    /// Writes a folder in diffusers layout for the online student and one for the target.
    pub(super) fn write_finished(
        &self,
        mut write: impl FnMut(
            &str,
            &Map<String, Value>,
            &Tensors,
        ) -> std::result::Result<(), TrainError>,
    ) -> std::result::Result<(), TrainError> {
        write("unet", &self.model, &self.online)?;
        write("unet_target", &self.model, &self.target)
    }
}

/// `state.json`, which makes a checkpoint of the files it speaks of.
pub(super) fn write_state(
    destination: &Destination,
    below: &str,
    state: &State,
) -> std::result::Result<(), TrainError> {
    let name = format!("{below}{STATE}");
    let json = serde_json::to_vec_pretty(state)
        .map_err(|error| destination.failed(&name, io::Error::from(error)))?;
    destination.write(&name, &json)?;
    Ok(())
}

/// A model in diffusers layout, under names that begin with `below`; the checksum of each file by the rest of its name.
/// `config.json` comes last: a folder with it is whole.
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
