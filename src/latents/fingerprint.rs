//! Fingerprint of the weights that latents and embeddings were made with.

use std::path::Path;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::encode::Encoders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ModelError, TEXT_ENCODER_STEM, Weights};

/// Values that are hashed at once.
const HASHED: usize = 1 << 14;

/// Hashes of the weights of a VAE and a text encoder, `sha256:` and hexadecimal digits.
///
/// Computed from each tensor's name, shape and values as f32, in name order. Independent of the folder's path, of the
/// split into files and of the prefix `text_model.`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Hash of the autoencoder, with its decoder.
    pub vae: String,
    /// Hash of the text encoder.
    pub text_encoder: String,
}

impl Fingerprint {
    /// Hashes the weights in a pipeline's folder; those of the autoencoder in `vae` if given.
    ///
    /// # Errors
    /// When weights are missing or damaged.
    pub fn of(pipeline: &Path, vae: Option<&Path>) -> Result<Self, ModelError> {
        let [vae, text_encoder] = Encoders::folders(pipeline, vae);
        Ok(Self {
            vae: hash(&vae, WEIGHTS_STEM)?,
            text_encoder: hash(&text_encoder, TEXT_ENCODER_STEM)?,
        })
    }
}

fn hash(folder: &Path, stem: &str) -> Result<String, ModelError> {
    let weights = Weights::load(folder, stem, DType::F32, &Device::Cpu)?;
    let mut sha = Sha256::new();
    let mut bytes = Vec::new();
    for (name, tensor) in weights.tensors() {
        // position_ids: 0, 1, 2 …, saved by some versions of transformers only.
        if !tensor.dtype().is_float() {
            continue;
        }
        let name = name.strip_prefix("text_model.").unwrap_or(name);
        sha.update((name.len() as u64).to_le_bytes());
        sha.update(name);
        sha.update((tensor.rank() as u64).to_le_bytes());
        for &size in tensor.dims() {
            sha.update((size as u64).to_le_bytes());
        }
        let tensor = tensor.flatten_all()?;
        for from in (0..tensor.elem_count()).step_by(HASHED) {
            let count = HASHED.min(tensor.elem_count() - from);
            let values = tensor.narrow(0, from, count)?.to_vec1::<f32>()?;
            bytes.clear();
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            sha.update(&bytes);
        }
    }
    Ok(format!("sha256:{:x}", sha.finalize()))
}
