//! Encoded bytes to RGB.
//!
//! The format is detected from the content, never from the name. Limits are checked on the header, before
//! pixels are decoded. The standard is Pillow's `convert("RGB")`, which the reference's loader uses. Rules for
//! the formats:
//! - JPEG pixels are Pillow's to the bit ([`super::jpeg`]); CMYK and YCCK are read as Pillow reads
//!   them, inverted as Adobe's programs store them;
//! - EXIF orientation is not applied and colour profiles are not used, as in the reference;
//! - transparency is composited on white (Pillow drops the alpha channel);
//! - 16 bit channels are rounded to 8 (Pillow truncates them, and turns 16-bit grey white);
//! - the first frame of an animation is used;
//! - of a GIF the screen reaches as far as the first frame; outside the frame it has the frame's first colour;
//! - data that ends early is an error, in every format.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};

use super::error::DecodeError;
use super::jpeg::Jpeg;
use super::repair::{colour_outside, repaired};
use super::unread::unread_format;
use crate::panic::panic_message;

/// An image in memory.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// The pixels, 8 bit.
    pub pixels: RgbImage,
    /// Lower-case name of the format: `jpeg`, `png` …
    pub format: &'static str,
}

const FORMATS: [(ImageFormat, &str); 5] = [
    (ImageFormat::Jpeg, "jpeg"),
    (ImageFormat::Png, "png"),
    (ImageFormat::WebP, "webp"),
    (ImageFormat::Gif, "gif"),
    (ImageFormat::Bmp, "bmp"),
];

/// Lower-case name of an image's format; `None` if it is none of the formats that are decoded.
pub(crate) fn format_of(bytes: &[u8]) -> Option<&'static str> {
    let format = image::guess_format(bytes).ok()?;
    let known = FORMATS.into_iter().find(|(known, _)| *known == format);
    known.map(|(_, name)| name)
}

/// An image whose header has been read.
pub(super) struct Encoded<'a> {
    decoder: FormatDecoder<'a>,
    format: &'static str,
    size: (u32, u32),
}

enum FormatDecoder<'a> {
    Jpeg(Box<Jpeg<'a>>),
    Other {
        decoder: Box<dyn ImageDecoder + 'a>,
        /// The colour beneath transparent pixels.
        beneath: [u8; 3],
    },
}

fn damaged(error: &image::ImageError) -> DecodeError {
    DecodeError::Damaged(error.to_string())
}

/// Calls a decoder and turns a panic into [`DecodeError::Damaged`]: the input is untrusted bytes.
fn catch_panics<T>(work: impl FnOnce() -> Result<T, DecodeError>) -> Result<T, DecodeError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let message = panic_message(payload.as_ref());
        Err(DecodeError::Damaged(format!(
            "the decoder gave up: {message}"
        )))
    })
}

impl<'a> Encoded<'a> {
    /// Reads only the header.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        if bytes.is_empty() {
            return Err(DecodeError::Damaged(
                "it has no bytes, or its file could not be opened".to_owned(),
            ));
        }
        if let Some(name) = unread_format(bytes) {
            return Err(DecodeError::UnreadFormat(name));
        }
        let format = image::guess_format(bytes).map_err(|_| DecodeError::UnknownFormat)?;
        let (format, name) = FORMATS
            .into_iter()
            .find(|(known, _)| *known == format)
            .ok_or(DecodeError::UnknownFormat)?;
        catch_panics(|| {
            let (decoder, size) = if format == ImageFormat::Jpeg {
                let jpeg = Jpeg::open(bytes)?;
                let size = jpeg.size();
                (FormatDecoder::Jpeg(Box::new(jpeg)), size)
            } else {
                let decoder =
                    ImageReader::with_format(Cursor::new(repaired(format, bytes)), format)
                        .into_decoder()
                        .map_err(|error| damaged(&error))?;
                let size = decoder.dimensions();
                let decoder = FormatDecoder::Other {
                    decoder: Box::new(decoder),
                    beneath: colour_outside(format, bytes).unwrap_or(WHITE),
                };
                (decoder, size)
            };
            Ok(Self {
                decoder,
                format: name,
                size,
            })
        })
    }

    /// Width and height. Pixels.
    pub(super) fn size(&self) -> (u32, u32) {
        self.size
    }

    /// The largest reduction at which [`Self::decode`] still yields a shorter side of at least
    /// `resolution`. 1 for all formats but JPEG, and for rare kinds of that.
    pub(super) fn reduction(&self, resolution: u32) -> u32 {
        let shorter = self.size.0.min(self.size.1);
        let enough = |reduction: &u32| shorter / reduction >= resolution;
        match &self.decoder {
            FormatDecoder::Jpeg(jpeg) if jpeg.is_reducible() => {
                [8, 4, 2].into_iter().find(enough).unwrap_or(1)
            }
            _ => 1,
        }
    }

    /// Decodes to 8-bit RGB at one `reduction`th of the size, rounded up. Writes the pixels to the start of
    /// `pixels` and returns the size. `reduction` must be 1 or the value of [`Self::reduction`].
    pub(super) fn decode(
        self,
        max_pixels: u64,
        reduction: u32,
        pixels: &mut Vec<u8>,
    ) -> Result<(u32, u32), DecodeError> {
        let (width, height) = self.size;
        if u64::from(width) * u64::from(height) > max_pixels {
            return Err(DecodeError::TooLarge {
                width,
                height,
                max_pixels,
            });
        }
        if width == 0 || height == 0 {
            return Err(DecodeError::Damaged("has no pixels".to_owned()));
        }
        catch_panics(|| match self.decoder {
            FormatDecoder::Jpeg(jpeg) => jpeg.decode(reduction, pixels),
            FormatDecoder::Other {
                mut decoder,
                beneath,
            } => {
                let mut limits = image::Limits::no_limits();
                // Twice the widest pixel (16-bit RGBA): decoders need memory besides the result.
                limits.max_alloc = Some(max_pixels.saturating_mul(16));
                decoder
                    .set_limits(limits)
                    .map_err(|error| damaged(&error))?;
                let image = DynamicImage::from_decoder(decoder).map_err(|error| damaged(&error))?;
                let rgb = if image.color().has_alpha() {
                    composited(&image.into_rgba8(), beneath)
                } else {
                    image.into_rgb8()
                };
                *pixels = rgb.into_raw();
                Ok((width, height))
            }
        })
    }
}

/// Reads only the header: format name, width and height in pixels.
///
/// # Errors
/// [`DecodeError`] if the header can't be read.
pub fn probe(bytes: &[u8]) -> Result<(&'static str, u32, u32), DecodeError> {
    let image = Encoded::open(bytes)?;
    let (width, height) = image.size();
    Ok((image.format, width, height))
}

/// Decodes to 8-bit RGB.
///
/// # Errors
/// [`DecodeError`] for what isn't an image, is damaged, or has more than `max_pixels` pixels.
pub fn decode(bytes: &[u8], max_pixels: u64) -> Result<Decoded, DecodeError> {
    let image = Encoded::open(bytes)?;
    let format = image.format;
    let mut pixels = Vec::new();
    let (width, height) = image.decode(max_pixels, 1, &mut pixels)?;
    let pixels = RgbImage::from_raw(width, height, pixels)
        .ok_or_else(|| DecodeError::Damaged("has fewer pixels than it says".to_owned()))?;
    Ok(Decoded { pixels, format })
}

const WHITE: [u8; 3] = [255; 3];

fn composited(image: &image::RgbaImage, beneath: [u8; 3]) -> RgbImage {
    let mut flat = RgbImage::new(image.width(), image.height());
    for (to, from) in flat.pixels_mut().zip(image.pixels()) {
        let [r, g, b, alpha] = from.0;
        for ((to, from), beneath) in to.0.iter_mut().zip([r, g, b]).zip(beneath) {
            let alpha = u32::from(alpha);
            let mixed = u32::from(from) * alpha + u32::from(beneath) * (255 - alpha);
            *to = u8::try_from((mixed + 127) / 255).unwrap_or(u8::MAX);
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageBuffer, Luma, Rgb, Rgba};
    use libjpeg_turbo_rs::{PixelFormat, Subsampling};

    const MANY: u64 = 1 << 20;

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        if format == ImageFormat::Jpeg {
            let (width, height) = (image.width() as usize, image.height() as usize);
            let rgb = image.to_rgb8();
            let (layout, halved) = (PixelFormat::Rgb, Subsampling::S420);
            return libjpeg_turbo_rs::compress(&rgb, width, height, layout, 90, halved).unwrap();
        }
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn decode_composites_transparency_on_white() {
        let mut image = ImageBuffer::from_pixel(3, 1, Rgba([10_u8, 20, 30, 255]));
        image.put_pixel(1, 0, Rgba([10, 20, 30, 0]));
        image.put_pixel(2, 0, Rgba([0, 100, 255, 128]));
        let decoded = decode(&encoded(&image.into(), ImageFormat::Png), MANY).unwrap();
        assert_eq!(decoded.format, "png");
        assert_eq!(decoded.pixels.get_pixel(0, 0), &Rgb([10, 20, 30]));
        assert_eq!(decoded.pixels.get_pixel(1, 0), &Rgb([255, 255, 255]));
        assert_eq!(decoded.pixels.get_pixel(2, 0), &Rgb([127, 177, 255]));
    }

    #[test]
    fn decode_makes_rgb8_of_deep_and_grey_images() {
        let deep = ImageBuffer::from_pixel(2, 2, Rgb([0xABCD_u16, 0, 0xFFFF]));
        let decoded = decode(&encoded(&deep.into(), ImageFormat::Png), MANY).unwrap();
        assert_eq!(decoded.pixels.get_pixel(0, 0), &Rgb([0xAB, 0, 0xFF]));
        let grey = ImageBuffer::from_pixel(2, 2, Luma([99_u8]));
        let decoded = decode(&encoded(&grey.into(), ImageFormat::Jpeg), MANY).unwrap();
        assert_eq!(decoded.format, "jpeg");
        assert_eq!(decoded.pixels.get_pixel(1, 1), &Rgb([99, 99, 99]));
    }

    #[test]
    fn decode_checks_the_limit_on_the_header() {
        let image = ImageBuffer::from_pixel(100, 50, Rgb([1_u8, 2, 3]));
        let bytes = encoded(&image.into(), ImageFormat::Bmp);
        assert_eq!(probe(&bytes), Ok(("bmp", 100, 50)));
        let error = decode(&bytes, 4999).unwrap_err();
        assert_eq!(
            error.to_string(),
            "is 100x50 pixels; at most 4999 are allowed"
        );
        assert!(decode(&bytes, 5000).is_ok());
    }

    #[test]
    fn decode_refuses_damaged_and_unknown_data() {
        let image = ImageBuffer::from_fn(64, 64, |x, y| Rgb([(x * 4) as u8, (y * 4) as u8, 9_u8]));
        let png = encoded(&image.into(), ImageFormat::Png);
        assert!(matches!(
            decode(&png[..png.len() / 2], MANY),
            Err(DecodeError::Damaged(_))
        ));
        assert_eq!(
            decode(b"<html>", MANY).unwrap_err(),
            DecodeError::UnknownFormat
        );
        assert!(matches!(decode(b"", MANY), Err(DecodeError::Damaged(_))));
    }

    #[test]
    fn decode_never_panics() {
        let image: DynamicImage =
            ImageBuffer::from_fn(16, 16, |x, y| Rgb([(x * 16) as u8, (y * 16) as u8, 9_u8])).into();
        let mut generator = fastrand::Rng::with_seed(5);
        for (format, _) in FORMATS {
            let whole = encoded(&image, format);
            for _ in 0..300 {
                let mut damaged = whole.clone();
                for _ in 0..generator.usize(1..6) {
                    let at = generator.usize(0..damaged.len());
                    damaged[at] = generator.u8(..);
                }
                let _ = decode(&damaged, MANY);
            }
        }
    }
}
