//! Resizing as Pillow does it, antialiased and in 8 bit. Only the crop window is computed.
//!
//! Bilinear, box and Hamming differ from Pillow by at most one grey level. Bicubic and Lanczos differ
//! by at most two, where their negative lobes meet hard edges: the weights here have fewer bits than
//! Pillow's. With box, a source pixel on the border of two new pixels may go to the other pixel than with
//! Pillow, because the last bit of a fraction decides.
//!
//! A window may differ in single bits from the same window cut out of the whole resized image: the largest
//! weight decides the precision of all weights, and weights are larger at an image's edge.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};

use super::buffer::grow_to;
use super::crop::{CropWindow, crop_to_planes};
use super::error::DecodeError;

/// Interpolation of pixels; names as in Pillow and the reference's `--interpolation_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// Triangle filter.
    #[default]
    Bilinear,
    /// Catmull-Rom cubic.
    Bicubic,
    /// Lanczos of three lobes.
    Lanczos,
    /// Average of the source pixels that the new pixel covers.
    Box,
    /// Hamming window: sharper than bilinear at its cost.
    Hamming,
    /// The nearest pixel, with no antialiasing. For Pillow images, torchvision's `nearest_exact` is the same.
    #[serde(alias = "nearest_exact")]
    Nearest,
}

impl Interpolation {
    /// The filter and its radius, in pixels of the smaller image. `None` for `Nearest`.
    fn filter(self) -> Option<(FilterType, f64)> {
        match self {
            Self::Bilinear => Some((FilterType::Bilinear, 1.0)),
            Self::Bicubic => Some((FilterType::CatmullRom, 2.0)),
            Self::Lanczos => Some((FilterType::Lanczos3, 3.0)),
            Self::Box => Some((FilterType::Box, 0.5)),
            Self::Hamming => Some((FilterType::Hamming, 1.0)),
            Self::Nearest => None,
        }
    }
}

/// The size whose shorter side is `resolution`, as torchvision's `Resize`: the longer side is rounded down.
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

/// The image to be resized, 8-bit RGB.
#[derive(Debug, Clone, Copy)]
pub(super) struct SourcePixels<'a> {
    /// `[height, width, 3]`.
    pub(super) data: &'a [u8],
    /// Columns and rows.
    pub(super) size: (u32, u32),
    /// Columns and rows, from the upper left corner, that the image covers: less than `size` if it was decoded
    /// at a fraction of its size that is no whole number of pixels.
    pub(super) extent: (f64, f64),
}

/// The window to compute.
#[derive(Debug, Clone, Copy)]
pub(super) struct CropTarget {
    /// Columns and rows of the whole image after resizing.
    pub(super) size: (u32, u32),
    /// Position of the window in the resized image.
    pub(super) window: CropWindow,
    /// Side of the window.
    pub(super) side: u32,
    /// Interpolation.
    pub(super) interpolation: Interpolation,
}

/// Resizes images, and reuses its work space. One per thread.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    resizer: Resizer,
    rows: Vec<u8>,
    window: Vec<u8>,
}

impl Scaler {
    /// Resizes to the target's size and crops to its window: `[3, side, side]`, 8 bit.
    pub(super) fn resize_and_crop(
        &mut self,
        source: SourcePixels<'_>,
        target: &CropTarget,
    ) -> Result<Vec<u8>, DecodeError> {
        let CropTarget { window, side, .. } = *target;
        if source.size == target.size {
            let (columns, at) = (source.size.0, (window.top, window.left));
            return Ok(crop_to_planes(
                source.data,
                columns,
                at,
                side,
                window.flipped,
            ));
        }
        match target.interpolation.filter() {
            Some((filter, reach)) => self.convolve(source, target, filter, reach)?,
            None => nearest(source, target, &mut self.window),
        }
        Ok(crop_to_planes(
            &self.window,
            side,
            (0, 0),
            side,
            window.flipped,
        ))
    }

    /// Computes the window into `self.window`.
    ///
    /// Rows first, then columns, as Pillow: the intermediate 8-bit values clip overshoots, so the order changes
    /// the result. The library's default is columns first.
    fn convolve(
        &mut self,
        source: SourcePixels<'_>,
        target: &CropTarget,
        filter: FilterType,
        reach: f64,
    ) -> Result<(), DecodeError> {
        let CropTarget { window, side, .. } = *target;
        let step = |extent: f64, size: u32| extent / f64::from(size);
        let across = step(source.extent.0, target.size.0);
        let down = step(source.extent.1, target.size.1);
        // Rows of the source that the window needs: with the filter's radius and one spare row.
        let (top, bottom) = (f64::from(window.top), f64::from(window.top + side));
        let reach = reach * down.max(1.0) + 1.0;
        let first = (top * down - reach).floor().max(0.0) as u32;
        let last = ((bottom * down + reach).ceil() as u32).min(source.size.1);

        let stride = 3 * source.size.0 as usize;
        let band = Plane {
            data: &source.data[first as usize * stride..last as usize * stride],
            size: (source.size.0, last - first),
        };
        let keep = Rect {
            left: f64::from(window.left) * across,
            top: 0.0,
            width: f64::from(side) * across,
            height: f64::from(band.size.1),
        };
        let rows = (side, band.size.1);
        pass(&mut self.resizer, filter, band, keep, rows, &mut self.rows)?;

        let narrow = Plane {
            data: &self.rows,
            size: rows,
        };
        let keep = Rect {
            left: 0.0,
            top: top * down - f64::from(first),
            width: f64::from(side),
            height: f64::from(side) * down,
        };
        let (resizer, window) = (&mut self.resizer, &mut self.window);
        pass(resizer, filter, narrow, keep, (side, side), window)
    }
}

/// `[height, width, 3]` and its width and height.
#[derive(Clone, Copy)]
struct Plane<'a> {
    data: &'a [u8],
    size: (u32, u32),
}

/// A rectangle in a plane, in fractional pixels.
#[derive(Clone, Copy)]
struct Rect {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

/// Resizes a rectangle of a plane into the start of `out`.
fn pass(
    resizer: &mut Resizer,
    filter: FilterType,
    from: Plane<'_>,
    rect: Rect,
    to: (u32, u32),
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let failed =
        |error: &dyn std::fmt::Display| DecodeError::Damaged(format!("resizing failed: {error}"));
    let (width, height) = from.size;
    let bytes = 3 * width as usize * height as usize;
    let source = from
        .data
        .get(..bytes)
        .ok_or_else(|| failed(&"too few pixels"))?;
    let source =
        ImageRef::new(width, height, source, PixelType::U8x3).map_err(|error| failed(&error))?;
    let out = grow_to(out, 3 * to.0 as usize * to.1 as usize);
    let mut target =
        Image::from_slice_u8(to.0, to.1, out, PixelType::U8x3).map_err(|error| failed(&error))?;
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(filter))
        .use_alpha(false)
        // Rounding must not move the rectangle over the edge.
        .crop(
            rect.left,
            rect.top,
            rect.width.min(f64::from(width) - rect.left),
            rect.height.min(f64::from(height) - rect.top),
        );
    resizer
        .resize(&source, &mut target, &options)
        .map_err(|error| failed(&error))
}

/// Computes the window by picking pixels, `[side, side, 3]`.
fn nearest(source: SourcePixels<'_>, target: &CropTarget, out: &mut Vec<u8>) {
    let CropTarget { window, side, .. } = *target;
    let source_index = |at: u32, extent: f64, size: u32, limit: u32| {
        let step = extent / f64::from(size);
        (((f64::from(at) + 0.5) * step) as u32).min(limit - 1) as usize
    };
    let ((columns, rows), (wide, high)) = (source.size, target.size);
    let columns_of: Vec<usize> = (window.left..window.left + side)
        .map(|x| source_index(x, source.extent.0, wide, columns))
        .collect();
    let out = grow_to(out, 3 * side as usize * side as usize);
    for (y, line) in (window.top..).zip(out.chunks_exact_mut(3 * side as usize)) {
        let row = source_index(y, source.extent.1, high, rows) * columns as usize;
        for (pixel, column) in line.chunks_exact_mut(3).zip(&columns_of) {
            let at = 3 * (row + column);
            pixel.copy_from_slice(&source.data[at..at + 3]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;

    const SIDE: u32 = 24;

    #[test]
    fn resized_size_is_torchvisions() {
        assert_eq!(resized_size(640, 480, 512), (682, 512));
        assert_eq!(resized_size(480, 640, 512), (512, 682));
        assert_eq!(resized_size(512, 512, 512), (512, 512));
        assert_eq!(resized_size(100, 100, 512), (512, 512));
        assert_eq!(resized_size(1023, 3, 64), (21824, 64));
    }

    fn golden(name: &str) -> RgbImage {
        let path = format!("{}/tests/golden/{name}.png", env!("CARGO_MANIFEST_DIR"));
        image::open(path).unwrap().into_rgb8()
    }

    fn square_of(
        scaler: &mut Scaler,
        image: &RgbImage,
        size: (u32, u32),
        side: u32,
        (left, top): (u32, u32),
        interpolation: Interpolation,
    ) -> Vec<u8> {
        let source = SourcePixels {
            data: image.as_raw(),
            size: image.dimensions(),
            extent: (f64::from(image.width()), f64::from(image.height())),
        };
        let flipped = false;
        let window = CropWindow { top, left, flipped };
        let target = CropTarget {
            size,
            window,
            side,
            interpolation,
        };
        scaler.resize_and_crop(source, &target).unwrap()
    }

    /// The greatest difference and the share of levels that differ.
    fn difference(a: &[u8], b: &[u8]) -> (u8, f64) {
        assert_eq!(a.len(), b.len());
        let apart = || a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
        let unequal = apart().filter(|&by| by > 0).count();
        let share = unequal as f64 / a.len() as f64;
        (apart().max().unwrap_or(0), share)
    }

    #[test]
    fn resize_matches_pillow_within_two_levels() {
        let source = golden("source");
        let mut scaler = Scaler::default();
        let mut apart = Vec::new();
        for (interpolation, name, resolutions, tolerance) in [
            (Interpolation::Bilinear, "bilinear", [24, 80], 1),
            (Interpolation::Hamming, "hamming", [24, 80], 1),
            (Interpolation::Box, "box", [25, 80], 1),
            (Interpolation::Bicubic, "bicubic", [24, 80], 2),
            (Interpolation::Lanczos, "lanczos", [24, 80], 2),
            (Interpolation::Nearest, "nearest", [24, 80], 0),
        ] {
            for resolution in resolutions {
                let expected = golden(&format!("{name}-{resolution}"));
                let size = expected.dimensions();
                assert_eq!(size, resized_size(61, 97, resolution));
                let mut worst = 0;
                for top in 0..=size.1 - SIDE {
                    let at = ((size.0 - SIDE) * top / size.1, top);
                    let square = square_of(&mut scaler, &source, size, SIDE, at, interpolation);
                    let expected =
                        crop_to_planes(expected.as_raw(), size.0, (at.1, at.0), SIDE, false);
                    worst = worst.max(difference(&square, &expected).0);
                }
                if worst > tolerance {
                    apart.push(format!("{name} {resolution} by {worst}"));
                }
            }
        }
        assert!(apart.is_empty(), "{apart:?}");
    }

    #[test]
    fn resize_window_matches_the_whole_image() {
        let mut random = fastrand::Rng::with_seed(11);
        let mut scaler = Scaler::default();
        let (mut unequal, mut windows) = (0.0, 0.0);
        for _ in 0..400 {
            let (width, height) = (random.u32(1..300), random.u32(1..300));
            let image = RgbImage::from_fn(width, height, |_, _| {
                image::Rgb([random.u8(..), random.u8(..), random.u8(..)])
            });
            let side = random.u32(1..120);
            let size = resized_size(width, height, side);
            if u64::from(size.0) * u64::from(size.1) > 1 << 20 {
                continue;
            }
            for (interpolation, tolerance) in [
                (Interpolation::Bilinear, 1),
                (Interpolation::Bicubic, 2),
                (Interpolation::Lanczos, 2),
                (Interpolation::Nearest, 0),
            ] {
                let at = (random.u32(0..=size.0 - side), random.u32(0..=size.1 - side));
                let whole = whole_of(&image, size, interpolation);
                let square = square_of(&mut scaler, &image, size, side, at, interpolation);
                let cut = crop_to_planes(&whole, size.0, (at.1, at.0), side, false);
                let (worst, share) = difference(&square, &cut);
                let of = format!("{interpolation:?} {width}x{height} to {size:?} at {at:?}");
                assert!(worst <= tolerance, "{of}: {worst}");
                unequal += share;
                windows += 1.0;
            }
        }
        assert!(unequal / windows < 5e-2, "{}", unequal / windows);
    }

    /// All of the image resized, the way a window is.
    fn whole_of(image: &RgbImage, size: (u32, u32), interpolation: Interpolation) -> Vec<u8> {
        let (width, height) = image.dimensions();
        let Some((filter, _)) = interpolation.filter() else {
            let pixels = |x: u32, y: u32| {
                let source_index = |at: u32, from: u32, to: u32| {
                    ((f64::from(at) + 0.5) * (f64::from(from) / f64::from(to))) as u32
                };
                image[(
                    source_index(x, width, size.0),
                    source_index(y, height, size.1),
                )]
            };
            return RgbImage::from_fn(size.0, size.1, pixels).into_raw();
        };
        let mut resizer = Resizer::new();
        let all = |(width, height): (u32, u32)| Rect {
            left: 0.0,
            top: 0.0,
            width: f64::from(width),
            height: f64::from(height),
        };
        let (mut rows, mut out) = (Vec::new(), Vec::new());
        let data = image.as_raw();
        let plane = Plane {
            data,
            size: (width, height),
        };
        let rect = all(plane.size);
        pass(
            &mut resizer,
            filter,
            plane,
            rect,
            (size.0, height),
            &mut rows,
        )
        .unwrap();
        let plane = Plane {
            data: &rows,
            size: (size.0, height),
        };
        let rect = all(plane.size);
        pass(&mut resizer, filter, plane, rect, size, &mut out).unwrap();
        out
    }
}
