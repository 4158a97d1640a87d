//! Oddities of images that can be used.

use std::io::Cursor;

use image::codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader};

/// Whether `extension` is that of another format than `format` (a name of [`crate::image::decode`]).
/// False for an extension of no format, as `img`.
pub(super) fn has_wrong_extension(extension: &str, format: &str) -> bool {
    let last = extension.rsplit('.').next().unwrap_or(extension);
    let expected = match last {
        "jpg" | "jpeg" | "jpe" | "jfif" => "jpeg",
        "png" | "apng" => "png",
        "webp" | "gif" | "bmp" => last,
        _ => return false,
    };
    expected != format
}

/// Whether an image has more than one frame. Only the first is used.
pub(super) fn is_animated(bytes: &[u8]) -> bool {
    let reader = Cursor::new(bytes);
    match image::guess_format(bytes) {
        Ok(ImageFormat::Gif) => GifDecoder::new(reader)
            .is_ok_and(|decoder| decoder.into_frames().take(2).filter_map(Result::ok).count() > 1),
        Ok(ImageFormat::WebP) => {
            WebPDecoder::new(reader).is_ok_and(|decoder| decoder.has_animation())
        }
        Ok(ImageFormat::Png) => {
            PngDecoder::new(reader).is_ok_and(|decoder| decoder.is_apng().unwrap_or(false))
        }
        _ => false,
    }
}

/// Whether an image has 16 bits per channel. Only 8 are kept.
pub(super) fn has_16_bits(bytes: &[u8]) -> bool {
    let decoder = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map(ImageReader::into_decoder);
    let Ok(Ok(decoder)) = decoder else {
        return false;
    };
    matches!(
        decoder.original_color_type(),
        ExtendedColorType::L16
            | ExtendedColorType::La16
            | ExtendedColorType::Rgb16
            | ExtendedColorType::Rgba16
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::codecs::gif::GifEncoder;
    use image::{DynamicImage, Frame, ImageBuffer, Rgb, RgbImage, Rgba, RgbaImage};

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn wrong_extension_is_found() {
        assert!(has_wrong_extension("jpg", "png"));
        assert!(has_wrong_extension("seg.png", "jpeg"));
        assert!(!has_wrong_extension("jpeg", "jpeg"));
        assert!(!has_wrong_extension("image", "webp"));
    }

    #[test]
    fn animation_and_depth_are_found() {
        let gif = |frames: u8| {
            let mut bytes = Vec::new();
            let mut encoder = GifEncoder::new(&mut bytes);
            for n in 0..frames {
                let frame = RgbaImage::from_pixel(4, 4, Rgba([n * 90, 0, 0, 255]));
                encoder.encode_frame(Frame::new(frame)).unwrap();
            }
            drop(encoder);
            bytes
        };
        assert!(is_animated(&gif(2)));
        assert!(!is_animated(&gif(1)));
        let deep_png = ImageBuffer::from_pixel(2, 2, Rgb([0xABCD_u16, 0, 1]));
        let deep_png = encoded(&deep_png.into(), ImageFormat::Png);
        let flat = encoded(&RgbImage::new(2, 2).into(), ImageFormat::Png);
        assert!(has_16_bits(&deep_png) && !is_animated(&deep_png));
        assert!(!has_16_bits(&flat));
        assert!(!has_16_bits(b"no image") && !is_animated(b"no image"));
    }
}
