//! Encoded bytes to square crops of pixels: decode, resize, crop, flip.
//!
//! Pure CPU work on one image at a time; no threads, channels or shards. The standard is the reference's
//! loader, which uses Pillow and torchvision: sizes and crop offsets are equal, JPEGs are decoded to the
//! same bits, and bilinear resizing differs by at most one grey level. With [`ImageOptions::scaled_decode`]
//! large JPEGs are decoded at a fraction of their size, which is faster and gives other pixels.
//!
//! The crop window is known from the header, so only the window is resized.

mod buffer;
mod crop;
mod decode;
mod error;
mod jpeg;
mod planes;
mod repair;
mod resize;
mod transform;
mod unread;

pub use crop::{CropGeometry, CropMode, CropWindow};
pub use decode::{Decoded, decode, probe};
pub use error::DecodeError;
pub use resize::{Interpolation, resized_size};

pub(crate) use decode::format_of;
pub(crate) use transform::{Crops, ImageTransform};

use serde::{Deserialize, Serialize};

/// Options of the image transform.
///
/// Deserialises from the table `[image]` of a configuration; every field left out has its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageOptions {
    /// Side of the crops, and of the shorter side after resizing. Pixels.
    pub resolution: u32,
    /// Interpolation of resizing; antialiased, as Pillow.
    pub interpolation: Interpolation,
    /// Position of the crops.
    pub crop: CropMode,
    /// Mirror half of the crops.
    pub flip: bool,
    /// Crops of each image, each with its own window; at least 1. Not a key of `[image]`.
    #[serde(skip)]
    pub crops: usize,
    /// Decode a JPEG at 1/2, 1/4 or 1/8 of its size if its shorter side is then still `resolution`
    /// or more. Faster, but not the pixels that resizing the whole image gives. Never for
    /// [`Interpolation::Nearest`], which picks pixels.
    pub scaled_decode: bool,
    /// Images of more pixels than this are skipped before they are decoded. Not a key of `[image]`.
    #[serde(skip)]
    pub max_pixels: u64,
    /// Encoded images of more bytes than this are skipped without being read. Not a key of `[image]`.
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

/// Grey levels, 0 to 255, to the range of the models, -1.0 to 1.0.
///
/// Computed as torchvision's `ToTensor` and `Normalize([0.5], [0.5])`, step by step in `f32`.
#[must_use]
pub fn normalize(levels: &[u8]) -> Vec<f32> {
    let value = |&level: &u8| (f32::from(level) / 255.0 - 0.5) / 0.5;
    levels.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalize_spans_minus_one_to_one() {
        let values = normalize(&[0, 255, 128]);
        assert_eq!(values.len(), 3);
        assert_eq!(values[..2], [-1.0, 1.0]);
        assert!((values[2] - 0.003_921_6).abs() < 1e-6);
    }
}
