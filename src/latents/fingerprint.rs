//! Fingerprint of the weights that latents and embeddings were made with.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::encode::Encoders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ClipTokenizer, ModelError, TEXT_ENCODER_STEM, TextParts, fingerprint_in_one};

/// Hashes of the weights of a VAE and of text encoders, `sha256:` and hexadecimal digits.
///
/// Computed from each tensor's name, shape and values as f32, in name order. Independent of the folder's path, of the
/// split into files and of the prefix `text_model.`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Hash of the autoencoder, with its decoder.
    pub vae: String,
    /// Hash of the text encoder.
    pub text_encoder: String,
    /// Hashes of what SDXL has besides; absent for other models.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub second: Option<SecondText>,
}

/// Hashes of the second text encoder of SDXL, and of both tokenizers, which differ in their padding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecondText {
    /// Hash of the second text encoder's weights.
    pub text_encoder_2: String,
    /// Hash of the first tokenizer.
    pub tokenizer: String,
    /// Hash of the second tokenizer.
    pub tokenizer_2: String,
}

impl Fingerprint {
    /// Hashes the weights in a pipeline's folder; those of the autoencoder in `vae` if given.
    ///
    /// # Errors
    /// When weights are missing or damaged.
    pub fn of(pipeline: &Path, vae: Option<&Path>) -> Result<Self, ModelError> {
        let TextParts { first, second } = TextParts::of(pipeline);
        let tokenizer = |folder: &Path| ClipTokenizer::load(folder)?.fingerprint();
        let second = second.map(|second| -> Result<SecondText, ModelError> {
            Ok(SecondText {
                text_encoder_2: fingerprint_in_one(&second.text_encoder, TEXT_ENCODER_STEM)?,
                tokenizer: tokenizer(&first.tokenizer)?,
                tokenizer_2: tokenizer(&second.tokenizer)?,
            })
        });
        let vae = Encoders::vae_folder(pipeline, vae);
        Ok(Self {
            vae: fingerprint_in_one(&vae, WEIGHTS_STEM)?,
            text_encoder: fingerprint_in_one(&first.text_encoder, TEXT_ENCODER_STEM)?,
            second: second.transpose()?,
        })
    }
}
