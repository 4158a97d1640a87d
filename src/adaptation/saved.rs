//! The folders that hold a student: in checkpoints, finished runs and audits.

use serde_json::{Map, Value};

use crate::lora;
use crate::models::FileContents;

/// The models of a folder, before they are written.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// Name of the folder, e.g. `unet`; empty for files in no folder of their own.
    pub name: String,
    /// Files of tensors.
    pub files: Vec<TensorFile>,
    /// Content of `config.json`, if there is one.
    pub config: Option<Map<String, Value>>,
}

/// A safetensors file, before it is written.
#[derive(Clone, Debug)]
pub struct TensorFile {
    /// Its name.
    pub name: String,
    /// Its tensors and metadata.
    pub contents: FileContents,
}

/// A folder of a checkpoint, and the files in it that are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedFolder {
    /// Its name.
    pub name: &'static str,
    /// The files.
    pub files: &'static [&'static str],
}

/// File of the weights of a UNet.
pub(super) const UNET_WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// Folder of a wholly trained student.
pub(super) const UNET: &str = "unet";
/// Folder of its moving average.
pub(super) const UNET_TARGET: &str = "unet_target";

const UNET_FILES: &[&str] = &["config.json", UNET_WEIGHTS];

/// Every folder that a checkpoint or a finished run may hold a student in.
pub const SAVED_FOLDERS: [SavedFolder; 3] = [
    SavedFolder {
        name: UNET,
        files: UNET_FILES,
    },
    SavedFolder {
        name: UNET_TARGET,
        files: UNET_FILES,
    },
    SavedFolder {
        name: lora::FOLDER,
        files: &[lora::DIFFUSERS_FILE],
    },
];

/// The folders that a checkpoint with these files holds its student in.
pub fn saved_folders<'a>(mut files: impl Iterator<Item = &'a str>) -> &'static [SavedFolder] {
    static FOLDERS: [SavedFolder; 3] = SAVED_FOLDERS;
    let (full, lora) = FOLDERS.split_at(2);
    let is_lora = files.any(|file| file.split('/').next() == Some(lora::FOLDER));
    if is_lora { lora } else { full }
}
