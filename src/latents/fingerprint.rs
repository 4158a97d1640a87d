//! Fingerprint of the weights that latents and embeddings were made with.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::encode::Encoders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ModelError, TEXT_ENCODER_STEM, fingerprint_in_one};

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
            vae: fingerprint_in_one(&vae, WEIGHTS_STEM)?,
            text_encoder: fingerprint_in_one(&text_encoder, TEXT_ENCODER_STEM)?,
        })
    }
}
