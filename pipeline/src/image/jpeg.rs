//! JPEG, decoded as libjpeg-turbo does it: the pixels are Pillow's to the bit.
//!
//! Baseline, progressive and arithmetic coding; grey, YCbCr, RGB, CMYK and YCCK. Subsampled colour channels
//! are interpolated ("fancy upsampling"), which is libjpeg's default.
//!
//! A JPEG consists of blocks of 8x8 pixels in the frequency domain. A block can be decoded to 4x4, 2x2 or 1x1
//! pixels at a lower cost: [`Jpeg::decode`] with a reduction of 2, 4 or 8.
//!
//! Truncated data and invalid codes are errors, where libjpeg warns and guesses. No image with grey or torn
//! parts is trained on.

use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder, JpegError, PixelFormat, ScalingFactor};

use super::buffer::grow_to;
use super::error::DecodeError;
use super::planes::{Sampling, colour, full_size};

/// Progressive files have about ten scans; each scan costs a pass over the whole image.
const MAX_SCANS: usize = 100;

const END_OF_IMAGE: u8 = 0xD9;
const START_OF_SCAN: u8 = 0xDA;

/// A JPEG whose header has been read.
pub(super) struct Jpeg<'a> {
    decoder: Decoder<'a>,
    format: PixelFormat,
    /// Whether the end-of-image marker follows the last scan. The decoder for arithmetic coding does not
    /// detect missing data.
    is_complete: bool,
    /// The sampling factors, if the decoder can't upsample the components.
    by_planes: Option<Vec<Sampling>>,
}

fn damaged(error: &JpegError) -> DecodeError {
    DecodeError::Damaged(error.to_string())
}

impl<'a> Jpeg<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let limits = DecodeLimits {
            max_scans: MAX_SCANS,
            ..DecodeLimits::default()
        };
        let mut decoder =
            Decoder::new_with_limits(bytes, limits).map_err(|error| damaged(&error))?;
        let header = decoder.header();
        if header.precision != 8 {
            let bits = header.precision;
            return Err(DecodeError::Damaged(format!(
                "has {bits} bits a channel, and only JPEGs of 8 are read"
            )));
        }
        let format = match header.components.len() {
            1 | 3 => PixelFormat::Rgb,
            4 => PixelFormat::Cmyk,
            channels => {
                return Err(DecodeError::Damaged(format!(
                    "has {channels} channels, and only JPEGs of 1, 3 or 4 are read"
                )));
            }
        };
        let by_planes = by_planes(&decoder);
        decoder.set_output_format(format);
        let last = |marker: u8| bytes.windows(2).rposition(|pair| pair == [0xFF, marker]);
        let is_complete = !decoder.is_arithmetic() || last(END_OF_IMAGE) > last(START_OF_SCAN);
        Ok(Self {
            decoder,
            format,
            is_complete,
            by_planes,
        })
    }

    /// Whether [`Self::decode`] accepts other reductions than 1.
    pub(super) fn is_reducible(&self) -> bool {
        self.by_planes.is_none()
    }

    /// Width and height. Pixels.
    pub(super) fn size(&self) -> (u32, u32) {
        let header = self.decoder.header();
        (u32::from(header.width), u32::from(header.height))
    }

    /// Decodes to 8-bit RGB at one `reduction`th (1, 2, 4 or 8) of the size, rounded up. Writes the pixels to
    /// the start of `pixels` and returns the size.
    pub(super) fn decode(
        mut self,
        reduction: u32,
        pixels: &mut Vec<u8>,
    ) -> Result<(u32, u32), DecodeError> {
        if !self.is_complete {
            return Err(DecodeError::Damaged("ends early".to_owned()));
        }
        if let Some(factors) = &self.by_planes {
            return decode_planes(self.decoder, factors, pixels);
        }
        let scale = ScalingFactor::try_new(1, reduction).map_err(|error| damaged(&error))?;
        self.decoder.set_scale(scale);
        let bytes = self
            .decoder
            .output_buffer_size()
            .map_err(|error| damaged(&error))?;
        let mut inks = Vec::new();
        let target = match self.format {
            PixelFormat::Cmyk => &mut inks,
            _ => &mut *pixels,
        };
        let info = self
            .decoder
            .decode_image_into(grow_to(target, bytes))
            .map_err(|error| damaged(&error))?;
        if self.format == PixelFormat::Cmyk {
            let rgb = grow_to(pixels, info.width * info.height * 3);
            for (to, from) in rgb.chunks_exact_mut(3).zip(inks.chunks_exact(4)) {
                let paper = [from[0], from[1], from[2]].map(|ink| shade(ink, from[3]));
                to.copy_from_slice(&paper);
            }
        }
        let side = |pixels| u32::try_from(pixels).unwrap_or(u32::MAX);
        Ok((side(info.width), side(info.height)))
    }
}

/// The sampling factors, if the decoder can't upsample the components: the first one does not have the greatest factors, or black
/// has others.
fn by_planes(decoder: &Decoder<'_>) -> Option<Vec<Sampling>> {
    if !matches!(
        decoder.jpeg_color_space(),
        ColorSpace::YCbCr | ColorSpace::Cmyk | ColorSpace::Ycck
    ) {
        return None;
    }
    let factors = decoder.header().components.iter().map(|component| {
        let across = usize::from(component.horizontal_sampling);
        (across, usize::from(component.vertical_sampling))
    });
    let factors: Vec<Sampling> = factors.collect();
    let first = *factors.first()?;
    let is_finer = |other: &Sampling| other.0 > first.0 || other.1 > first.1;
    let other_black = factors.get(3).is_some_and(|black| *black != first);
    (other_black || factors.iter().any(is_finer)).then_some(factors)
}

/// Decodes to RGB by way of the components' planes.
fn decode_planes(
    decoder: Decoder<'_>,
    factors: &[Sampling],
    pixels: &mut Vec<u8>,
) -> Result<(u32, u32), DecodeError> {
    let colours = decoder.jpeg_color_space();
    let (raw, warnings) = decoder
        .decode_raw_with_warnings()
        .map_err(|error| damaged(&error))?;
    if let Some(warning) = warnings.first() {
        return Err(DecodeError::Damaged(format!("{warning:?}")));
    }
    let planes = full_size(&raw, factors).ok_or_else(|| {
        let factors = format!("has the sampling factors {factors:?}, which libjpeg refuses too");
        DecodeError::Damaged(factors)
    })?;
    let rgb = grow_to(pixels, raw.width * raw.height * 3);
    for (index, pixel) in rgb.chunks_exact_mut(3).enumerate() {
        let first = [&planes[0], &planes[1], &planes[2]].map(|plane| plane[index]);
        let black = planes.get(3).map(|plane| plane[index]);
        pixel.copy_from_slice(&match (colours, black) {
            (ColorSpace::Cmyk, Some(black)) => first.map(|ink| shade(ink, black)),
            (ColorSpace::Ycck, Some(black)) => {
                colour(first).map(|level| shade(u8::MAX - level, black))
            }
            _ => colour(first),
        });
    }
    let side = |pixels| u32::try_from(pixels).unwrap_or(u32::MAX);
    Ok((side(raw.width), side(raw.height)))
}

/// Pillow's conversion of an ink over black: their product, with Pillow's rounding. Both are stored inverted,
/// as Adobe's programs do.
fn shade(ink: u8, black: u8) -> u8 {
    let product = (255 - u32::from(ink)) * u32::from(black) + 128;
    let absorbed = ((product >> 8) + product) >> 8;
    black.saturating_sub(u8::try_from(absorbed).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jpeg_inks_are_stored_inverted() {
        assert_eq!(shade(255, 255), 255, "no ink, no black");
        assert_eq!(shade(0, 255), 0, "all ink");
        assert_eq!(shade(255, 0), 0, "all black");
        assert_eq!(shade(100, 255), 100);
        assert_eq!(shade(128, 128), 64);
    }

    #[test]
    fn jpeg_names_the_kinds_it_refuses() {
        // Start of image, a frame header of 12 bits or of two channels, start of scan.
        let frame = |kind: u8, bits: u8, channels: u8| {
            let mut bytes = vec![0xFF, 0xD8, 0xFF, kind, 0, 8 + 3 * channels];
            bytes.extend([bits, 0, 16, 0, 16, channels]);
            (1..=channels).for_each(|id| bytes.extend([id, 0x11, 0]));
            bytes.extend([0xFF, 0xDA, 0, 6 + 2 * channels, channels]);
            (1..=channels).for_each(|id| bytes.extend([id, 0]));
            bytes.extend([0, 63, 0, 0, 0xFF, 0xD9]);
            bytes
        };
        for (bytes, complaint) in [
            (frame(0xC1, 12, 1), "12 bits a channel"),
            (frame(0xC0, 8, 2), "2 channels"),
        ] {
            let error = Jpeg::open(&bytes).err().map(|error| error.to_string());
            assert!(
                error.as_ref().is_some_and(|text| text.contains(complaint)),
                "{error:?}"
            );
        }
    }
}
