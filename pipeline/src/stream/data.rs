//! The data of a batch's samples.

use half::f16;

/// Data of a batch's samples, in their order.
#[derive(Debug, Clone, PartialEq)]
pub enum BatchData {
    /// Pixels of images.
    Pixels {
        /// `[B, crops, 3, R, R]`, 8 bit: a quarter of the memory that the models' input takes. See
        /// [`normalize`](crate::image::normalize).
        levels: Vec<u8>,
        /// `R`: side of the crops. Pixels.
        resolution: u32,
    },
    /// Stored latents.
    Latents {
        /// Mean and log-variance, neither clamped nor scaled: `[B, 2C, h, w]`.
        moments: F16Array<3>,
        /// Text embeddings, `[B, T, width]`; `None` if the stream does not read them.
        prompt_embeds: Option<F16Array<2>>,
        /// Pooled text embeddings, `[B, P]`; `None` if the stream does not read them.
        pooled: Option<F16Array<1>>,
    },
}

/// f16 arrays of one shape, one for each sample of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct F16Array<const D: usize> {
    /// Values of all samples, each in C order. All are finite.
    pub values: Vec<f16>,
    /// Shape of one sample's array.
    pub shape: [usize; D],
}
