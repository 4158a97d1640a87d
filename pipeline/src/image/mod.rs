//! Encoded bytes to a square of pixels: decode, resize, crop, flip.
//!
//! Pure CPU work on one image at a time; no threads, channels or shards. What Pillow and
//! torchvision do in the reference's loader is the measure: sizes and crop offsets are theirs, JPEGs
//! are decoded to the same bits, and a pixel resized bilinearly differs by at most one grey level.
//! With [`ImageOptions::scaled_decode`] large JPEGs are decoded at a fraction, which is faster and
//! not the same.
//!
//! Where the crop lies is known from the header, so only what it keeps is resized.

mod crop;
mod decode;
mod jpeg;
mod resize;
mod square;

pub use crop::{CropMode, CropWindow};
pub use decode::{DecodeError, Decoded, decode, probe};
pub use resize::{Interpolation, resized_size};

pub(crate) use square::{SquareMaker, Squares};

use serde::{Deserialize, Serialize};

/// How an image becomes a square of pixels.
///
/// Deserialises from the table `[image]` of a configuration; every field left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageOptions {
    /// Side of the square that comes out, and what the shorter side is resized to. Pixels.
    pub resolution: u32,
    /// How pixels are interpolated when resizing; antialiased, as Pillow.
    pub interpolation: Interpolation,
    /// Where the square is cut.
    pub crop: CropMode,
    /// Mirror half of the squares.
    pub flip: bool,
    /// Squares cut out of each image, each at its own place; at least 1. Not a key of `[image]`.
    #[serde(skip)]
    pub crops: usize,
    /// Decode a JPEG at 1/2, 1/4 or 1/8 of its size if its shorter side is then still `resolution`
    /// or more. Faster, but not the pixels that resizing the whole image gives. Never for
    /// [`Interpolation::Nearest`], which picks pixels.
    pub scaled_decode: bool,
    /// Images of more pixels than this are skipped before they are decoded. Not a key of `[image]`.
    #[serde(skip)]
    pub max_pixels: u64,
    /// Encoded images of more bytes than this are skipped unread. Not a key of `[image]`.
    #[serde(skip)]
    pub max_bytes: u64,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            resolution: 512,
            interpolation: Interpolation::Bilinear,
            crop: CropMode::Random,
            flip: false,
            crops: 1,
            scaled_decode: true,
            // Where Pillow refuses an image as a decompression bomb.
            max_pixels: 178_956_970,
            max_bytes: 256 << 20,
        }
    }
}

/// Grey levels to the range of the models, 0 to -1.0 and 255 to 1.0, in place of what `values` held.
///
/// Computed as torchvision's `ToTensor` and `Normalize([0.5], [0.5])`, step by step in `f32`.
pub fn normalize(levels: &[u8], values: &mut Vec<f32>) {
    values.clear();
    values.extend(
        levels
            .iter()
            .map(|&level| (f32::from(level) / 255.0 - 0.5) / 0.5),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_span_minus_one_to_one() {
        let mut range = vec![7.0; 9];
        normalize(&[0, 255, 128], &mut range);
        assert_eq!(range.len(), 3);
        assert_eq!(range[..2], [-1.0, 1.0]);
        assert!((range[2] - 0.003_921_6).abs() < 1e-6);
    }
}
