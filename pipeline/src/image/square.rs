//! From an encoded image to its square, with work space that is kept.

use rand_chacha::rand_core::RngCore;

use super::crop::{CropWindow, place};
use super::decode::{DecodeError, Encoded};
use super::resize::{Pixels, Scaler, Target, resized_size};
use super::{ImageOptions, Interpolation};

/// Work space above this is given back after the image that needed it, so that one huge image
/// doesn't hold memory for ever. Bytes.
const KEPT: usize = 64 << 20;

/// A square cut from an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Square {
    /// `[3, R, R]`, 8 bit.
    pub(crate) pixels: Vec<u8>,
    /// Width and height of the image. Pixels.
    pub(crate) original: (u32, u32),
    /// Width and height after resizing, before cropping. Pixels.
    pub(crate) resized: (u32, u32),
    /// Where it was cut.
    pub(crate) window: CropWindow,
}

/// Makes squares of images, keeping its work space between them. One a thread.
#[derive(Debug, Default)]
pub(crate) struct SquareMaker {
    pixels: Vec<u8>,
    scaler: Scaler,
}

impl SquareMaker {
    /// Decodes an image, resizes its shorter side to the resolution and cuts a square out, at a
    /// place drawn from `rng` if the options say so.
    ///
    /// # Errors
    /// [`DecodeError`] for what isn't an image, is damaged, or has too many pixels, before or after
    /// resizing.
    pub(crate) fn make(
        &mut self,
        bytes: &[u8],
        options: &ImageOptions,
        rng: &mut impl RngCore,
    ) -> Result<Square, DecodeError> {
        let image = Encoded::open(bytes)?;
        let original @ (width, height) = image.size();
        let side = options.resolution;
        let resized = resized_size(width, height, side);
        // A long and thin image grows beyond all measure.
        if u64::from(resized.0) * u64::from(resized.1) > options.max_pixels {
            return Err(DecodeError::TooLarge {
                width,
                height,
                max_pixels: options.max_pixels,
            });
        }
        let window = place(resized, side, options.crop, options.flip, rng);
        let scaled = options.scaled_decode && options.interpolation != Interpolation::Nearest;
        let reduction = if scaled { image.reduction(side) } else { 1 };
        let size = image.decode(options.max_pixels, reduction, &mut self.pixels)?;
        let extent = |side: u32| f64::from(side) / f64::from(reduction);
        let source = Pixels {
            data: &self.pixels,
            size,
            extent: (extent(width), extent(height)),
        };
        let target = Target {
            size: resized,
            window,
            side,
            interpolation: options.interpolation,
        };
        let pixels = self.scaler.square(source, &target)?;
        if self.pixels.len() > KEPT {
            *self = Self::default();
        }
        Ok(Square {
            pixels,
            original,
            resized,
            window,
        })
    }
}
