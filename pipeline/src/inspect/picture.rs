//! What is odd about an image that can be used all the same.

use std::io::Cursor;

use image::codecs::{gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{AnimationDecoder, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader};

/// Whether an extension promises another format than `format` (a name of [`crate::image::decode`]).
/// An extension that promises none, as `img`, doesn't lie.
pub(super) fn lies(extension: &str, format: &str) -> bool {
    let last = extension.rsplit('.').next().unwrap_or(extension);
    let promised = match last {
        "jpg" | "jpeg" | "jpe" | "jfif" => "jpeg",
        "png" | "apng" => "png",
        "webp" | "gif" | "bmp" => last,
        _ => return false,
    };
    promised != format
}

/// Whether an image has more than one frame, of which only the first is taken.
pub(super) fn animated(bytes: &[u8]) -> bool {
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

/// Whether an image has 16 bits a channel, of which 8 are kept.
pub(super) fn deep(bytes: &[u8]) -> bool {
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
    fn extensions_are_held_to_what_they_promise() {
        assert!(lies("jpg", "png"));
        assert!(lies("seg.png", "jpeg"));
        assert!(!lies("jpeg", "jpeg"));
        assert!(!lies("image", "webp"));
    }

    #[test]
    fn frames_and_depth_are_seen() {
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
        assert!(animated(&gif(2)));
        assert!(!animated(&gif(1)));
        let deep_png = ImageBuffer::from_pixel(2, 2, Rgb([0xABCD_u16, 0, 1]));
        let deep_png = encoded(&deep_png.into(), ImageFormat::Png);
        let flat = encoded(&RgbImage::new(2, 2).into(), ImageFormat::Png);
        assert!(deep(&deep_png) && !animated(&deep_png));
        assert!(!deep(&flat));
        assert!(!deep(b"no image") && !animated(b"no image"));
    }
}
