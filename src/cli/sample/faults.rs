//! Why a drawing failed: the weights or the setting that are the cause.

use std::path::Path;

use image::RgbImage;

use super::Failure;
use super::pipeline_folders::PipelineFolders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{TEXT_ENCODER_STEM, TextParts, first_not_finite};
use crate::sample::{Intermediate, SampleError};

/// The failure for an error of a drawing. If a result is not finite, the weights are searched for the cause.
pub(super) fn explain(error: SampleError, folders: &PipelineFolders, guidance: f64) -> Failure {
    let fault = match error {
        SampleError::NotFinite(fault) => fault,
        SampleError::Encode(error) => return error.into(),
        SampleError::Tensor(error) => return error.into(),
        SampleError::Cancelled => return Failure::Stopped,
    };
    let (searched, stem) = match fault {
        Intermediate::Text => {
            let parts = TextParts::of(&folders.pipeline);
            let folders = parts.text_encoders().map(Path::to_owned).collect();
            (folders, TEXT_ENCODER_STEM)
        }
        Intermediate::Prediction { .. } | Intermediate::Latents => {
            (vec![folders.unet.clone()], WEIGHTS_STEM)
        }
        Intermediate::Pixels => (vec![folders.vae_folder()], WEIGHTS_STEM),
    };
    let mut found = None;
    for folder in &searched {
        match first_not_finite(folder, stem) {
            Ok(tensor) => found = found.or(tensor),
            Err(error) => return error.into(),
        }
    }
    let cause = match found {
        Some(tensor) => format!(
            "tensor \"{}\" of {} has such numbers; the file is damaged",
            tensor.name,
            tensor.file.display()
        ),
        None => {
            let searched: Vec<_> = searched.iter().map(|f| f.display().to_string()).collect();
            format!(
                "the weights in {} are finite; a --guidance lower than {guidance} or other --init-latents may help",
                searched.join(" and ")
            )
        }
    };
    Failure::Failed(format!("{fault} has numbers that are not finite: {cause}").into())
}

/// Refuses an image in which all pixels are the same, as damaged weights draw it.
pub(super) fn refuse_one_colour(
    image: &RgbImage,
    prompt: &str,
    folders: &PipelineFolders,
) -> Result<(), Failure> {
    let mut pixels = image.pixels();
    let Some(&first) = pixels.next() else {
        return Ok(());
    };
    if pixels.any(|&pixel| pixel != first) {
        return Ok(());
    }
    let vae = folders.vae_folder();
    let [r, g, b] = first.0;
    Err(Failure::Failed(
        format!(
            "the image of {prompt:?} is nothing but the colour #{r:02x}{g:02x}{b:02x}: the output of the VAE in {} is the same for all \
             pixels; the weights there or in {} are damaged, or --guidance is too high",
            vae.display(),
            folders.unet.display()
        )
        .into(),
    ))
}
