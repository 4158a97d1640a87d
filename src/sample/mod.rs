//! Images from captions: fixed prompts that training draws again and again, and the prompts of `coffey sample`.

mod generate;
mod passes;
mod prompts;

use std::fmt;

use candle_core::Tensor;
use image::RgbImage;

pub use generate::{Generator, SampleScheduler};
pub use prompts::{Guidance, Prompts};

use crate::draw::pixels_to_images;
use crate::encode::{EncodeError, Encoders};
use crate::ops::all_finite;

/// Why nothing was drawn.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The encoders failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A result has numbers that are not finite, of which no picture can be made.
    #[error("{0} has numbers that are not finite")]
    NotFinite(Intermediate),
    /// Drawing was cancelled.
    #[error("drawing was cancelled")]
    Cancelled,
}

/// A tensor between a caption and its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intermediate {
    /// The hidden states of the text encoder.
    Text,
    /// The UNet's output in a step, from 1.
    Prediction {
        /// The step.
        step: usize,
    },
    /// The latents after the last step.
    Latents,
    /// The VAE's output.
    Pixels,
}

impl fmt::Display for Intermediate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => f.write_str("the text encoder's output"),
            Self::Prediction { step } => write!(f, "the UNet's output in step {step}"),
            Self::Latents => f.write_str("the result of the last step"),
            Self::Pixels => f.write_str("the VAE's output"),
        }
    }
}

impl Intermediate {
    /// Refuses a tensor with numbers that are not finite.
    fn check(self, tensor: &Tensor) -> Result<(), SampleError> {
        if all_finite(tensor)? {
            Ok(())
        } else {
            Err(SampleError::NotFinite(self))
        }
    }
}

/// How far a drawing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// Passes of the network, of several images each.
    Passes {
        /// Passes made.
        done: usize,
        /// All passes.
        all: usize,
    },
    /// Decoded images.
    Images {
        /// Images that are done.
        done: usize,
        /// All images.
        all: usize,
    },
}

impl fmt::Display for Drawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passes { done, all } => write!(f, "pass {done}/{all}"),
            Self::Images { done, all } => write!(f, "image {done}/{all} decoded"),
        }
    }
}

/// Images of scaled latents `[B, C, h, w]`, decoded one by one: the autoencoder's memory is that of one image. `on_image` is told of
/// each.
///
/// # Errors
/// When a tensor operation fails, or an image has numbers that are not finite.
pub fn decode_images(
    encoders: &Encoders,
    latents: &Tensor,
    on_image: &dyn Fn(Drawn),
) -> Result<Vec<RgbImage>, SampleError> {
    let all = latents.dim(0)?;
    let mut images = Vec::with_capacity(all);
    for index in 0..all {
        let pixels = encoders.decode_latents(&latents.narrow(0, index, 1)?)?;
        Intermediate::Pixels.check(&pixels)?;
        images.extend(pixels_to_images(&pixels)?);
        on_image(Drawn::Images {
            done: index + 1,
            all,
        });
    }
    Ok(images)
}
