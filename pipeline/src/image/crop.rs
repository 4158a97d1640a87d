//! Choice of the crop window, and cutting it out.

use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

use crate::order::rng::below;

/// How the position of a crop window is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CropMode {
    /// Uniformly at random, as torchvision's `RandomCrop`.
    #[default]
    Random,
    /// The centre, as torchvision's `CenterCrop`.
    Center,
}

/// Position of a square in the resized image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropWindow {
    /// Rows above the square.
    pub top: u32,
    /// Columns left of the square.
    pub left: u32,
    /// Whether the square is mirrored after cutting.
    pub flipped: bool,
}

/// Sizes of an image, and the crop windows cut out of it. Zeros and no windows where unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CropGeometry {
    /// Width and height of the image. Pixels.
    pub original: (u32, u32),
    /// Width and height after resizing, before cropping. Pixels.
    pub resized: (u32, u32),
    /// The windows, in the order of the crops.
    pub crops: Vec<CropWindow>,
}

/// Chooses the window for a square of `side` in an image of `width` x `height`, which must not be smaller.
pub(super) fn choose_window(
    (width, height): (u32, u32),
    side: u32,
    mode: CropMode,
    flip: bool,
    rng: &mut impl RngCore,
) -> CropWindow {
    let (rows, columns) = (height.saturating_sub(side), width.saturating_sub(side));
    let (top, left) = match mode {
        CropMode::Random => {
            let mut upto = |n: u32| u32::try_from(below(rng, u64::from(n) + 1)).unwrap_or(0);
            (upto(rows), upto(columns))
        }
        CropMode::Center => (half_even(rows), half_even(columns)),
    };
    let flipped = flip && below(rng, 2) == 1;
    CropWindow { top, left, flipped }
}

/// Python's `round(n / 2.0)`: halves round to even.
fn half_even(n: u32) -> u32 {
    let half = n / 2;
    if n % 2 == 1 { half + half % 2 } else { half }
}

/// Cuts a square out of `pixels`, `[rows, columns, 3]`, at `top` and `left`: `[3, side, side]`.
///
/// Pixels beyond the image's edge are black.
pub(super) fn crop_to_planes(
    pixels: &[u8],
    columns: u32,
    (top, left): (u32, u32),
    side: u32,
    flipped: bool,
) -> Vec<u8> {
    let side = side as usize;
    let plane = side * side;
    let mut out = vec![0; 3 * plane];
    let stride = 3 * columns as usize;
    let (red, rest) = out.split_at_mut(plane);
    let (green, blue) = rest.split_at_mut(plane);
    let targets = red
        .chunks_exact_mut(side)
        .zip(green.chunks_exact_mut(side))
        .zip(blue.chunks_exact_mut(side));
    for (row, ((red, green), blue)) in targets.enumerate() {
        let start = (top as usize + row) * stride + 3 * left as usize;
        let Some(source) = pixels.get(start..start + 3 * side) else {
            break;
        };
        let source = source.chunks_exact(3);
        for (((r, g), b), pixel) in red.iter_mut().zip(&mut *green).zip(&mut *blue).zip(source) {
            (*r, *g, *b) = (pixel[0], pixel[1], pixel[2]);
        }
        if flipped {
            for channel in [red, green, blue] {
                channel.reverse();
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::rng::rng;
    use image::{Rgb, RgbImage};

    #[test]
    fn crop_center_rounds_as_python() {
        let rounded: Vec<u32> = (0..9).map(half_even).collect();
        assert_eq!(rounded, [0, 0, 1, 2, 2, 2, 3, 4, 4]);
    }

    #[test]
    fn crop_random_reaches_every_offset() {
        let mut seen = std::collections::BTreeSet::new();
        let mut flips = 0;
        for n in 0..500 {
            let window = choose_window(
                (10, 8),
                8,
                CropMode::Random,
                true,
                &mut rng(1, "crop", 0, n),
            );
            assert_eq!(window.top, 0);
            seen.insert(window.left);
            flips += u32::from(window.flipped);
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert!((200..300).contains(&flips), "{flips}");
    }

    #[test]
    fn crop_keeps_channels_and_mirrors() {
        let image = RgbImage::from_fn(4, 3, |x, y| Rgb([x as u8, y as u8, 9]));
        let cut = |flipped| crop_to_planes(image.as_raw(), 4, (1, 2), 2, flipped);
        assert_eq!(cut(false), [2, 3, 2, 3, 1, 1, 2, 2, 9, 9, 9, 9]);
        assert_eq!(cut(true), [3, 2, 3, 2, 1, 1, 2, 2, 9, 9, 9, 9]);
    }
}
