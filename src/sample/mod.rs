//! Images from captions: fixed prompts that training draws again and again, and the prompts of `coffey sample`.

mod generate;
mod prompts;

use candle_core::Tensor;
use image::RgbImage;

pub use generate::{Generator, SampleScheduler};
pub use prompts::{Guidance, Prompts};

use crate::draw::pixels_to_images;
use crate::encode::{EncodeError, Encoders};

/// Samples that pass the networks together.
const CHUNK: usize = 16;

/// Why nothing was drawn.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The encoders failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// Drawing was cancelled.
    #[error("drawing was cancelled")]
    Cancelled,
}

/// Images of scaled latents `[B, C, h, w]`.
///
/// # Errors
/// When a tensor operation fails.
pub fn decode_images(encoders: &Encoders, latents: &Tensor) -> Result<Vec<RgbImage>, SampleError> {
    let mut images = Vec::new();
    for from in (0..latents.dim(0)?).step_by(CHUNK) {
        let part = latents.narrow(0, from, CHUNK.min(latents.dim(0)? - from))?;
        images.extend(pixels_to_images(&encoders.decode_latents(&part)?)?);
    }
    Ok(images)
}
