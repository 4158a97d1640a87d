//! From an encoded image to its square, with work space that is kept.

use rand_chacha::rand_core::RngCore;

use super::crop::{CropWindow, place};
use super::decode::{DecodeError, Encoded};
use super::resize::{Pixels, Scaler, Target, resized_size};
use super::{ImageOptions, Interpolation};

/// Work space above this is given back after the image that needed it, so that one huge image
/// doesn't hold memory for ever. Bytes.
const KEPT: usize = 64 << 20;

/// The squares cut from an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Squares {
    /// `[crops, 3, R, R]`, 8 bit.
    pub(crate) pixels: Vec<u8>,
    /// Width and height of the image. Pixels.
    pub(crate) original: (u32, u32),
    /// Width and height after resizing, before cropping. Pixels.
    pub(crate) resized: (u32, u32),
    /// Where each was cut.
    pub(crate) windows: Vec<CropWindow>,
}

/// Makes squares of images, keeping its work space between them. One a thread.
#[derive(Debug, Default)]
pub(crate) struct SquareMaker {
    pixels: Vec<u8>,
    scaler: Scaler,
}

impl SquareMaker {
    /// Decodes an image, resizes its shorter side to the resolution and cuts squares out, at
    /// places drawn from `rng` one after another if the options say so.
    ///
    /// # Errors
    /// [`DecodeError`] for what isn't an image, is damaged, or has too many pixels, before or after
    /// resizing.
    pub(crate) fn make(
        &mut self,
        bytes: &[u8],
        options: &ImageOptions,
        rng: &mut impl RngCore,
    ) -> Result<Squares, DecodeError> {
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
        let mut place = || place(resized, side, options.crop, options.flip, rng);
        let windows: Vec<CropWindow> = (0..options.crops).map(|_| place()).collect();
        let scaled = options.scaled_decode && options.interpolation != Interpolation::Nearest;
        let reduction = if scaled { image.reduction(side) } else { 1 };
        let size = image.decode(options.max_pixels, reduction, &mut self.pixels)?;
        let extent = |side: u32| f64::from(side) / f64::from(reduction);
        let source = Pixels {
            data: &self.pixels,
            size,
            extent: (extent(width), extent(height)),
        };
        let mut square = |&window: &CropWindow| {
            let target = Target {
                size: resized,
                window,
                side,
                interpolation: options.interpolation,
            };
            self.scaler.square(source, &target)
        };
        let pixels = match windows.as_slice() {
            [window] => square(window)?,
            windows => windows
                .iter()
                .map(square)
                .collect::<Result<Vec<_>, _>>()?
                .concat(),
        };
        if self.pixels.len() > KEPT {
            *self = Self::default();
        }
        Ok(Squares {
            pixels,
            original,
            resized,
            windows,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{CropMode, Squares};
    use crate::order::rng::rng;
    use image::RgbImage;

    fn golden(name: &str) -> Vec<u8> {
        let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(path).unwrap()
    }

    fn make(bytes: &[u8], options: &ImageOptions) -> Result<Squares, DecodeError> {
        SquareMaker::default().make(bytes, options, &mut rng(1, "crop", 0, 0))
    }

    fn small() -> ImageOptions {
        ImageOptions {
            resolution: 64,
            crop: CropMode::Center,
            ..ImageOptions::default()
        }
    }

    /// Mean and greatest difference of a square from a golden image's part.
    fn apart(square: &Squares, whole: &RgbImage) -> (f64, u8) {
        assert_eq!(square.resized, whole.dimensions());
        let (window, side) = (square.windows[0], 64);
        let of = crate::image::crop::planes;
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
    fn a_photo_is_pillows_within_a_level_and_close_when_decoded_at_a_fraction() {
        let expected = image::load_from_memory(&golden("photo-64.png"))
            .unwrap()
            .into_rgb8();
        let exact = ImageOptions {
            scaled_decode: false,
            ..small()
        };
        let square = make(&golden("photo.jpg"), &exact).unwrap();
        assert_eq!((square.original, square.resized), ((400, 300), (85, 64)));
        let (_, worst) = apart(&square, &expected);
        assert!(worst <= 1, "{worst}");
        // A shorter side of 300 is decoded at a quarter, 75.
        let scaled = make(&golden("photo.jpg"), &small()).unwrap();
        assert_eq!(scaled.windows, square.windows);
        assert_ne!(scaled.pixels, square.pixels);
        let (mean, worst) = apart(&scaled, &expected);
        assert!(mean < 2.0 && worst < 30, "mean {mean}, greatest {worst}");
    }

    #[test]
    fn further_crops_leave_the_first_as_it_is() {
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
        assert_eq!(four.windows.len(), 4);
        assert_eq!(four.windows[0], one.windows[0]);
        assert!(
            four.windows[1..]
                .iter()
                .any(|window| *window != four.windows[0])
        );
        let squares: Vec<&[u8]> = four.pixels.chunks_exact(one.pixels.len()).collect();
        assert_eq!((squares.len(), squares[0]), (4, one.pixels.as_slice()));
        assert!(squares[1..].iter().any(|square| *square != squares[0]));
    }

    #[test]
    fn a_fraction_never_falls_below_the_target() {
        let bytes = golden("photo.jpg");
        let reduction = |resolution| Encoded::open(&bytes).unwrap().reduction(resolution);
        assert_eq!([37, 38, 75, 76].map(reduction), [8, 4, 4, 2]);
        assert_eq!([150, 151, 300, 512].map(reduction), [2, 1, 1, 1]);
        let png = golden("photo-64.png");
        assert_eq!(Encoded::open(&png).unwrap().reduction(8), 1);
    }

    #[test]
    fn work_space_that_was_used_before_leaves_no_trace() {
        let mut maker = SquareMaker::default();
        let kinds = [
            "photo.jpg",
            "formats/420.jpg",
            "formats/cmyk.jpg",
            "source.png",
        ];
        for name in kinds.iter().chain(kinds.iter().rev()) {
            let bytes = golden(name);
            let again = maker.make(&bytes, &small(), &mut rng(1, "crop", 0, 0));
            assert_eq!(again, make(&bytes, &small()), "{name}");
        }
    }

    #[test]
    fn a_thread_of_pixels_is_refused_and_not_blown_up() {
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
