//! The image transform: an encoded image to square crops, with reused work space.

use rand_chacha::rand_core::RngCore;

use super::crop::{CropGeometry, CropWindow, choose_window};
use super::decode::Encoded;
use super::error::DecodeError;
use super::resize::{CropTarget, Scaler, SourcePixels, resized_size};
use super::{ImageOptions, Interpolation};

/// Larger work space is freed after the image that needed it, so that one huge image does not hold memory for
/// the rest of the run. Bytes.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// The crops of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Crops {
    /// `[crops, 3, R, R]`, 8 bit.
    pub(crate) pixels: Vec<u8>,
    /// Sizes of the image, and the windows of the crops.
    pub(crate) geometry: CropGeometry,
}

/// Decodes, resizes and crops images, and reuses its work space. One per thread.
#[derive(Debug, Default)]
pub(crate) struct ImageTransform {
    pixels: Vec<u8>,
    scaler: Scaler,
}

impl Clone for ImageTransform {
    /// Work space is not copied: the clone starts without any.
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl ImageTransform {
    /// Decodes an image, resizes its shorter side to the resolution and cuts the crops out. Random windows are drawn
    /// from `rng`, one after another.
    ///
    /// # Errors
    /// [`DecodeError`] for what isn't an image, is damaged, or has too many pixels, before or after
    /// resizing.
    pub(crate) fn apply(
        &mut self,
        bytes: &[u8],
        options: &ImageOptions,
        rng: &mut impl RngCore,
    ) -> Result<Crops, DecodeError> {
        let image = Encoded::open(bytes)?;
        let original @ (width, height) = image.size();
        let side = options.resolution;
        let resized = resized_size(width, height, side);
        // Resizing the shorter side of a long and thin image can multiply its pixels.
        if u64::from(resized.0) * u64::from(resized.1) > options.max_pixels {
            return Err(DecodeError::TooLarge {
                width,
                height,
                max_pixels: options.max_pixels,
            });
        }
        let mut choose = || choose_window(resized, side, options.crop, options.flip, rng);
        let crops: Vec<CropWindow> = (0..options.crops).map(|_| choose()).collect();
        let scaled = options.scaled_decode && options.interpolation != Interpolation::Nearest;
        let reduction = if scaled { image.reduction(side) } else { 1 };
        let size = image.decode(options.max_pixels, reduction, &mut self.pixels)?;
        let extent = |side: u32| f64::from(side) / f64::from(reduction);
        let source = SourcePixels {
            data: &self.pixels,
            size,
            extent: (extent(width), extent(height)),
        };
        let mut crop = |&window: &CropWindow| {
            let target = CropTarget {
                size: resized,
                window,
                side,
                interpolation: options.interpolation,
            };
            self.scaler.resize_and_crop(source, &target)
        };
        let pixels = match crops.as_slice() {
            [window] => crop(window)?,
            windows => windows
                .iter()
                .map(crop)
                .collect::<Result<Vec<_>, _>>()?
                .concat(),
        };
        if self.pixels.len() > MAX_KEPT_BYTES {
            *self = Self::default();
        }
        Ok(Crops {
            pixels,
            geometry: CropGeometry {
                original,
                resized,
                crops,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::CropMode;
    use crate::order::rng::rng;
    use image::RgbImage;

    fn golden(name: &str) -> Vec<u8> {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(path).unwrap()
    }

    fn make(bytes: &[u8], options: &ImageOptions) -> Result<Crops, DecodeError> {
        ImageTransform::default().apply(bytes, options, &mut rng(1, "crop", 0, 0))
    }

    fn small() -> ImageOptions {
        ImageOptions {
            resolution: 64,
            crop: CropMode::Center,
            ..ImageOptions::default()
        }
    }

    /// Mean and greatest difference of a square from a golden image's part.
    fn apart(square: &Crops, whole: &RgbImage) -> (f64, u8) {
        assert_eq!(square.geometry.resized, whole.dimensions());
        let (window, side) = (square.geometry.crops[0], 64);
        let of = crate::image::crop::crop_to_planes;
        let expected = of(whole, whole.width(), (window.top, window.left), side, false);
        let by: Vec<u8> = expected
            .iter()
            .zip(&square.pixels)
            .map(|(a, b)| a.abs_diff(*b))
            .collect();
        let sum: f64 = by.iter().map(|&by| f64::from(by)).sum();
        (sum / by.len() as f64, by.into_iter().max().unwrap_or(0))
    }

    #[test]
    fn transform_matches_pillow_exact_and_scaled() {
        let expected = image::load_from_memory(&golden("photo-64.png"))
            .unwrap()
            .into_rgb8();
        let exact = ImageOptions {
            scaled_decode: false,
            ..small()
        };
        let square = make(&golden("photo.jpg"), &exact).unwrap();
        assert_eq!(
            (square.geometry.original, square.geometry.resized),
            ((400, 300), (85, 64))
        );
        let (_, worst) = apart(&square, &expected);
        assert!(worst <= 1, "{worst}");
        // A shorter side of 300 is decoded at a quarter, 75.
        let scaled = make(&golden("photo.jpg"), &small()).unwrap();
        assert_eq!(scaled.geometry, square.geometry);
        assert_ne!(scaled.pixels, square.pixels);
        let (mean, worst) = apart(&scaled, &expected);
        assert!(mean < 2.0 && worst < 30, "mean {mean}, greatest {worst}");
    }

    #[test]
    fn transform_adds_crops_without_changing_the_first() {
        let options = ImageOptions {
            crop: CropMode::Random,
            flip: true,
            ..small()
        };
        let bytes = golden("photo.jpg");
        let one = make(&bytes, &options).unwrap();
        let four = make(
            &bytes,
            &ImageOptions {
                crops: 4,
                ..options
            },
        )
        .unwrap();
        let windows = &four.geometry.crops;
        assert_eq!(windows.len(), 4);
        assert_eq!(windows[0], one.geometry.crops[0]);
        assert!(windows[1..].iter().any(|window| *window != windows[0]));
        let squares: Vec<&[u8]> = four.pixels.chunks_exact(one.pixels.len()).collect();
        assert_eq!((squares.len(), squares[0]), (4, one.pixels.as_slice()));
        assert!(squares[1..].iter().any(|square| *square != squares[0]));
    }

    #[test]
    fn reduction_never_falls_below_the_resolution() {
        let bytes = golden("photo.jpg");
        let reduction = |resolution| Encoded::open(&bytes).unwrap().reduction(resolution);
        assert_eq!([37, 38, 75, 76].map(reduction), [8, 4, 4, 2]);
        assert_eq!([150, 151, 300, 512].map(reduction), [2, 1, 1, 1]);
        let png = golden("photo-64.png");
        assert_eq!(Encoded::open(&png).unwrap().reduction(8), 1);
    }

    #[test]
    fn transform_reuse_changes_nothing() {
        let mut transform = ImageTransform::default();
        let kinds = [
            "photo.jpg",
            "formats/420.jpg",
            "formats/cmyk.jpg",
            "source.png",
        ];
        for name in kinds.iter().chain(kinds.iter().rev()) {
            let bytes = golden(name);
            let again = transform.apply(&bytes, &small(), &mut rng(1, "crop", 0, 0));
            assert_eq!(again, make(&bytes, &small()), "{name}");
        }
    }

    #[test]
    fn transform_refuses_thin_images_that_grow() {
        let thread = golden("formats/1x40.jpg");
        let options = ImageOptions {
            max_pixels: 64 * 64 * 39,
            ..small()
        };
        let error = make(&thread, &options).unwrap_err();
        assert!(matches!(
            error,
            DecodeError::TooLarge {
                width: 1,
                height: 40,
                ..
            }
        ));
        assert!(make(&thread, &small()).is_ok());
    }
}
