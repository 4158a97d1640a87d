//! Whether the parts of a pipeline belong together.

use std::path::Path;

use super::{UNetConfig, VaeConfig};

/// Parts of a pipeline that must agree in their shapes.
#[derive(Clone, Copy, Debug)]
pub struct PipelineParts<'a> {
    /// Folder of the pipeline, for messages.
    pub folder: &'a Path,
    /// The UNet.
    pub unet: &'a UNetConfig,
    /// The autoencoder.
    pub vae: &'a VaeConfig,
    /// Width of the text encoder's hidden states.
    pub text_width: usize,
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
        resolution,
    } = parts;
    let mismatch = |what: String| {
        let folder = folder.display();
        Err(PipelineMismatch(format!("{folder}: {what}")))
    };
    if unet.cross_attention_dim != *text_width {
        return mismatch(format!(
            "the text encoder makes embeddings of width {text_width}, the UNet's cross_attention_dim is {}",
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
