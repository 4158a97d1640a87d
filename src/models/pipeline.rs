//! The parts of a pipeline: where they are, and whether they belong together.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::weights::read_json;
use super::{ModelError, UNetConfig, VaeConfig};

/// Folder of SDXL's second text encoder.
pub const TEXT_ENCODER_2: &str = "text_encoder_2";
/// File that names the classes of a pipeline's parts.
const INDEX: &str = "model_index.json";

/// Folders of a text encoder and its tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPart {
    /// The text encoder.
    pub text_encoder: PathBuf,
    /// The tokenizer.
    pub tokenizer: PathBuf,
}

/// Folders of a pipeline's text encoders and tokenizers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextParts {
    /// `text_encoder/` and `tokenizer/`.
    pub first: TextPart,
    /// `text_encoder_2/` and `tokenizer_2/`, where there is such a text encoder (SDXL).
    pub second: Option<TextPart>,
}

impl TextParts {
    /// Those of the pipeline in the folder `pipeline`.
    pub fn of(pipeline: &Path) -> Self {
        let part = |text_encoder, tokenizer| TextPart {
            text_encoder: pipeline.join(text_encoder),
            tokenizer: pipeline.join(tokenizer),
        };
        let second = part(TEXT_ENCODER_2, "tokenizer_2");
        Self {
            first: part("text_encoder", "tokenizer"),
            second: second.text_encoder.is_dir().then_some(second),
        }
    }

    /// Folders of the text encoders.
    pub fn text_encoders(&self) -> impl Iterator<Item = &Path> {
        let all = std::iter::once(&self.first).chain(&self.second);
        all.map(|part| part.text_encoder.as_path())
    }
}

/// Whether the SDXL pipeline in the folder `pipeline` takes zeros in place of an absent negative prompt:
/// `force_zeros_for_empty_prompt`, which is true unless `model_index.json` says otherwise.
///
/// # Errors
/// When the file can't be read, or the value is neither true nor false.
pub fn forces_zeros(pipeline: &Path) -> Result<bool, ModelError> {
    const KEY: &str = "force_zeros_for_empty_prompt";
    let path = pipeline.join(INDEX);
    if !path.is_file() {
        return Ok(true);
    }
    let index: Map<String, Value> = read_json(&path)?;
    match index.get(KEY) {
        None => Ok(true),
        Some(Value::Bool(forces)) => Ok(*forces),
        Some(other) => Err(ModelError::Config {
            path,
            message: format!("\"{KEY}\" must be true or false, but it is {other}"),
        }),
    }
}

/// Parts of a pipeline that must agree in their shapes.
#[derive(Clone, Copy, Debug)]
pub struct PipelineParts<'a> {
    /// Folder of the pipeline, for messages.
    pub folder: &'a Path,
    /// The UNet.
    pub unet: &'a UNetConfig,
    /// The autoencoder.
    pub vae: &'a VaeConfig,
    /// Width of the text encoders' hidden states, side by side.
    pub text_width: usize,
    /// Width of the pooled text embedding, of a pipeline with two text encoders.
    pub pooled_width: Option<usize>,
    /// Side of the training images. Pixels.
    pub resolution: usize,
}

/// Parts that do not belong together; the message says which, with both values.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct PipelineMismatch(String);

/// What a UNet is that takes more channels than the latents have, as the end of a message; empty if it does not.
pub fn further_inputs(unet: usize, latents: usize) -> String {
    let Some(further) = unet.checked_sub(latents).filter(|more| *more > 0) else {
        return String::new();
    };
    let what = match further {
        5 => "it is an inpainting model, with a mask and the masked image as inputs",
        4 => "it edits images, with the original's latents as inputs (as InstructPix2Pix)",
        1 => "it has a depth map as input",
        3 => "it is an upscaler, with the small image as inputs",
        _ => "it has other inputs",
    };
    format!(": {what}; coffey distils UNets that take latents alone, so give the base model")
}

/// Checks that text encoder, UNet, autoencoder and resolution fit together.
///
/// # Errors
/// The first pair that does not.
pub fn check_fit(parts: &PipelineParts<'_>) -> Result<(), PipelineMismatch> {
    let PipelineParts {
        folder,
        unet,
        vae,
        text_width,
        pooled_width,
        resolution,
    } = parts;
    let mismatch = |what: String| {
        let folder = folder.display();
        Err(PipelineMismatch(format!("{folder}: {what}")))
    };
    match (unet.pooled_width(), *pooled_width) {
        (Some(_), None) => {
            return mismatch(format!(
                "the UNet is one of SDXL (addition_embed_type), which needs a second text encoder, and there is no {TEXT_ENCODER_2}/"
            ));
        }
        (None, Some(_)) => {
            return mismatch(format!(
                "there is a second text encoder ({TEXT_ENCODER_2}/), whose pooled embedding the UNet does not take (no \
                 addition_embed_type)"
            ));
        }
        (Some(needed), Some(made)) if needed != made => {
            return mismatch(format!(
                "{TEXT_ENCODER_2}/ makes pooled embeddings of width {made}, the UNet takes {needed} \
                 (projection_class_embeddings_input_dim less 6 times addition_time_embed_dim)"
            ));
        }
        _ => {}
    }
    if unet.cross_attention_dim != *text_width {
        let encoders = match pooled_width {
            None => "the text encoder makes",
            Some(_) => "the text encoders together make",
        };
        return mismatch(format!(
            "{encoders} embeddings of width {text_width}, the UNet's cross_attention_dim is {}",
            unet.cross_attention_dim
        ));
    }
    if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        return mismatch(format!(
            "the autoencoder's latents have {} channels, the UNet takes {} and makes {}{}",
            vae.latent_channels,
            unet.in_channels,
            unet.out_channels,
            further_inputs(unet.in_channels, vae.latent_channels)
        ));
    }
    if !resolution.is_multiple_of(vae.downscale()) {
        return mismatch(format!(
            "image.resolution = {resolution} must be a multiple of {} for this autoencoder",
            vae.downscale()
        ));
    }
    Ok(())
}
