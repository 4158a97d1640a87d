//! Resizing as Pillow does it: antialiased, in 8 bit.
//!
//! Bilinear differs from Pillow by at most one grey level. Bicubic and Lanczos differ by at most two,
//! where their negative lobes meet hard edges: the weights here have fewer bits than Pillow's.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use super::decode::DecodeError;

/// How pixels are interpolated; names as in Pillow and the reference's `--interpolation_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Interpolation {
    /// Triangle filter.
    #[default]
    Bilinear,
    /// Catmull-Rom cubic.
    Bicubic,
    /// Lanczos of three lobes.
    Lanczos,
    /// The nearest pixel, with no antialiasing.
    Nearest,
}

/// The size whose shorter side is `resolution`, as torchvision's `Resize`: the longer side is cut
/// down to a whole number.
#[must_use]
pub fn resized_size(width: u32, height: u32, resolution: u32) -> (u32, u32) {
    let (short, long) = (width.min(height).max(1), width.max(height));
    let scaled = u64::from(resolution) * u64::from(long) / u64::from(short);
    let longer = u32::try_from(scaled).unwrap_or(u32::MAX);
    if width <= height {
        (resolution, longer)
    } else {
        (longer, resolution)
    }
}

/// Resizes images, keeping its work space between them. One a thread.
#[derive(Debug, Default)]
pub(crate) struct Scaler {
    resizer: Resizer,
}

impl Scaler {
    /// Makes the shorter side `resolution`. The result may have at most `max_pixels` pixels, which a
    /// very long and thin image would exceed.
    pub(crate) fn resize(
        &mut self,
        image: RgbImage,
        resolution: u32,
        interpolation: Interpolation,
        max_pixels: u64,
    ) -> Result<RgbImage, DecodeError> {
        let (width, height) = resized_size(image.width(), image.height(), resolution);
        if (width, height) == image.dimensions() {
            return Ok(image);
        }
        if u64::from(width) * u64::from(height) > max_pixels {
            return Err(DecodeError::TooLarge {
                width: image.width(),
                height: image.height(),
                max_pixels,
            });
        }
        let convolution = match interpolation {
            Interpolation::Bilinear => FilterType::Bilinear,
            Interpolation::Bicubic => FilterType::CatmullRom,
            Interpolation::Lanczos => FilterType::Lanczos3,
            Interpolation::Nearest => return self.pass(&image, width, height, ResizeAlg::Nearest),
        };
        // Rows first, then columns, as Pillow: 8 bit in between cuts overshoots off, so the order
        // shows. Left to itself the library does columns first.
        let algorithm = ResizeAlg::Convolution(convolution);
        let rows = self.pass(&image, width, image.height(), algorithm)?;
        self.pass(&rows, width, height, algorithm)
    }

    fn pass(
        &mut self,
        image: &RgbImage,
        width: u32,
        height: u32,
        algorithm: ResizeAlg,
    ) -> Result<RgbImage, DecodeError> {
        let failed = |error: &dyn std::fmt::Display| {
            DecodeError::Damaged(format!("resizing failed: {error}"))
        };
        let pixels = image.as_raw();
        let source = ImageRef::new(image.width(), image.height(), pixels, PixelType::U8x3)
            .map_err(|error| failed(&error))?;
        let mut resized = RgbImage::new(width, height);
        let mut target = Image::from_slice_u8(width, height, resized.as_mut(), PixelType::U8x3)
            .map_err(|error| failed(&error))?;
        let options = ResizeOptions::new().resize_alg(algorithm).use_alpha(false);
        self.resizer
            .resize(&source, &mut target, &options)
            .map_err(|error| failed(&error))?;
        Ok(resized)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_torchvisions() {
        assert_eq!(resized_size(640, 480, 512), (682, 512));
        assert_eq!(resized_size(480, 640, 512), (512, 682));
        assert_eq!(resized_size(512, 512, 512), (512, 512));
        assert_eq!(resized_size(100, 100, 512), (512, 512));
        assert_eq!(resized_size(1023, 3, 64), (21824, 64));
    }

    #[test]
    fn a_thread_of_pixels_is_refused_and_not_blown_up() {
        let image = RgbImage::new(1, 60_000);
        let error = Scaler::default().resize(image, 512, Interpolation::Bilinear, 178_956_970);
        assert!(matches!(error, Err(DecodeError::TooLarge { .. })));
    }

    fn golden(name: &str) -> RgbImage {
        let path = format!("{}/tests/golden/{name}.png", env!("CARGO_MANIFEST_DIR"));
        image::open(path).unwrap().into_rgb8()
    }

    #[test]
    fn pixels_are_pillows_within_a_level_or_two() {
        let source = golden("source");
        let mut scaler = Scaler::default();
        for (interpolation, name, tolerance) in [
            (Interpolation::Bilinear, "bilinear", 1),
            (Interpolation::Bicubic, "bicubic", 2),
            (Interpolation::Lanczos, "lanczos", 2),
            (Interpolation::Nearest, "nearest", 0),
        ] {
            for resolution in [24, 80] {
                let expected = golden(&format!("{name}-{resolution}"));
                let resized = scaler
                    .resize(source.clone(), resolution, interpolation, 1 << 20)
                    .unwrap();
                assert_eq!(resized.dimensions(), expected.dimensions());
                let differences = resized
                    .as_raw()
                    .iter()
                    .zip(expected.as_raw())
                    .map(|(a, b)| a.abs_diff(*b));
                let worst = differences.max();
                assert!(worst <= Some(tolerance), "{name} {resolution}: {worst:?}");
            }
        }
    }
}
