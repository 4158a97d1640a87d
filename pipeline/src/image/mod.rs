//! Encoded bytes to a square of pixels: decode, resize, crop, flip.
//!
//! Pure CPU work on one image at a time; no threads, channels or shards. What Pillow and
//! torchvision do in the reference's loader is the measure: sizes and crop offsets are theirs, a
//! pixel resized bilinearly differs by at most one grey level.

mod crop;
mod decode;
mod resize;

pub use crop::{CropMode, CropWindow};
pub use decode::{DecodeError, Decoded, decode, probe};
pub use resize::{Interpolation, resized_size};

pub(crate) use crop::place;
pub(crate) use resize::Scaler;

/// What is made of every image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageOptions {
    /// Side of the square that comes out, and what the shorter side is resized to. Pixels.
    pub resolution: u32,
    /// How pixels are interpolated when resizing; antialiased, as Pillow.
    pub interpolation: Interpolation,
    /// Where the square is cut.
    pub crop: CropMode,
    /// Mirror half of the images.
    pub flip: bool,
    /// Images of more pixels than this are skipped before they are decoded.
    pub max_pixels: u64,
    /// Encoded images of more bytes than this are skipped unread.
    pub max_bytes: u64,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            resolution: 512,
            interpolation: Interpolation::Bilinear,
            crop: CropMode::Random,
            flip: false,
            // Where Pillow refuses an image as a decompression bomb.
            max_pixels: 178_956_970,
            max_bytes: 256 << 20,
        }
    }
}

/// Grey levels to the range of the models: 0 to -1.0, 255 to 1.0.
///
/// Computed as torchvision's `ToTensor` and `Normalize([0.5], [0.5])`, step by step in `f32`.
#[must_use]
pub fn normalize(levels: &[u8]) -> Vec<f32> {
    levels
        .iter()
        .map(|&level| (f32::from(level) / 255.0 - 0.5) / 0.5)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_span_minus_one_to_one() {
        let range = normalize(&[0, 255, 128]);
        assert_eq!(range[..2], [-1.0, 1.0]);
        assert!((range[2] - 0.003_921_6).abs() < 1e-6);
    }
}
