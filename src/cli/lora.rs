//! LoRAs for `sample` and `export`: that of a run, and files.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::Failure;
use super::output::check_local;
use crate::config::{ModelPlace, ModelRef};
use crate::lora::{self, DIFFUSERS_FILE, KOHYA_FILE, Lora, LoraError, Modules};
use crate::models::Weights;
use crate::models::unet::WEIGHTS_STEM;

/// A finished run of a LoRA, or one of its checkpoints.
#[derive(Debug)]
pub(super) struct LoraRun {
    /// Its folder.
    pub(super) folder: PathBuf,
    /// The LoRA's file.
    pub(super) file: PathBuf,
}

impl LoraRun {
    /// The run that a model's folder is: that of a run or checkpoint, or the folder `unet_lora` in it. `None` for another model.
    pub(super) fn find(model: &ModelRef) -> Option<Self> {
        let Ok(ModelPlace::Folder(folder)) = model.place() else {
            return None;
        };
        // Absolute, so that a relative "unet_lora" has a parent.
        let folder = std::path::absolute(folder).ok()?;
        let folder = match folder.file_name()? == lora::FOLDER {
            true => folder.parent()?.to_owned(),
            false => folder,
        };
        if folder.join("unet").is_dir() {
            return None;
        }
        let files = [DIFFUSERS_FILE, KOHYA_FILE].map(|name| folder.join(lora::FOLDER).join(name));
        let file = files.into_iter().find(|file| file.is_file())?;
        Some(Self { folder, file })
    }
}

impl From<LoraError> for Failure {
    fn from(error: LoraError) -> Self {
        match error {
            LoraError::Target { .. } => Self::Usage(error.into()),
            error => Self::Failed(error.into()),
        }
    }
}

/// Checks that `--lora` names a file, or a folder with a LoRA of diffusers.
pub(super) fn check_lora(path: &Path) -> Result<(), Failure> {
    check_local("--lora", path, "a local file or folder")?;
    let wrong = |what: String| {
        let message = format!("--lora {}: {what}", path.display());
        Err(Failure::Usage(message.into()))
    };
    if path.is_dir() && !path.join(DIFFUSERS_FILE).is_file() {
        return wrong(format!("the folder has no {DIFFUSERS_FILE}; name a file"));
    }
    if !path.exists() {
        return wrong("there is no such file".to_owned());
    }
    Ok(())
}

/// The LoRA in a file, for the UNet in a folder; prints what is left out of it.
pub(super) fn read_lora(file: &Path, unet: &Path) -> Result<Lora, Failure> {
    let read = lora::read(file, &Modules::read(unet)?)?;
    if let Some(warning) = read.warning(file) {
        errln!("warning: {warning}");
    }
    Ok(read.lora)
}

/// The weights of the UNet in a folder with a LoRA merged into them, f32 on `device`.
pub(super) fn merged_weights(
    unet: &Path,
    lora: &Lora,
    scale: f64,
    device: &Device,
) -> Result<Weights, Failure> {
    let weights = Weights::load(unet, WEIGHTS_STEM, DType::F32, device)?;
    let mut tensors = weights.into_tensors();
    lora::merge(&mut tensors, lora, scale)?;
    Ok(Weights::new(tensors, unet))
}
