//! Histograms: a panel each, two side by side.

use embedded_graphics::mono_font::ascii::{FONT_7X13, FONT_9X15_BOLD};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{PrimitiveStyle, Rectangle};
use embedded_graphics::text::Alignment;
use image::RgbImage;

use super::canvas::{Canvas, GREY, INK};

/// Size of a panel. Pixels.
const WIDTH: i32 = 560;
/// Height of a panel's title and of each bar with its distance. Pixels.
const TITLE: i32 = 44;
const ROW: i32 = 20;
/// Margins of a panel: labels are left of the bars, counts right of them. Pixels.
const LABELS: i32 = 128;
const COUNTS: i32 = 96;
const COLUMNS: usize = 2;

const BAR: Rgb888 = Rgb888::new(0x1b, 0x5e, 0xb0);

/// One histogram.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    /// Name of the quantity, with its unit.
    pub title: String,
    /// Label and count of each bar.
    pub bars: Vec<(String, u64)>,
}

/// Draws the histograms in rows of two.
pub fn histograms(histograms: &[Bars]) -> RgbImage {
    let heights: Vec<i32> = histograms
        .chunks(COLUMNS)
        .map(|row| row.iter().map(height).max().unwrap_or(0))
        .collect();
    let size = |pixels: i32| u32::try_from(pixels).unwrap_or(1).max(1);
    let columns = histograms.len().min(COLUMNS) as i32;
    let mut canvas = Canvas::new(size(WIDTH * columns), size(heights.iter().sum()));
    let mut top = 0;
    for (row, height) in histograms.chunks(COLUMNS).zip(heights) {
        for (column, bars) in row.iter().enumerate() {
            draw(&mut canvas, bars, Point::new(column as i32 * WIDTH, top));
        }
        top += height;
    }
    canvas.into_image()
}

fn height(bars: &Bars) -> i32 {
    TITLE + ROW * bars.bars.len().max(1) as i32 + ROW
}

fn draw(canvas: &mut Canvas, Bars { title, bars }: &Bars, corner: Point) {
    let at = |x, y| corner + Point::new(x, y);
    canvas.text(
        title,
        at(LABELS, TITLE / 2),
        &FONT_9X15_BOLD,
        INK,
        Alignment::Left,
    );
    if bars.is_empty() {
        canvas.text(
            "no values",
            at(LABELS, TITLE + ROW / 2),
            &FONT_7X13,
            GREY,
            Alignment::Left,
        );
    }
    let most = bars
        .iter()
        .map(|(_, count)| *count)
        .max()
        .unwrap_or(1)
        .max(1);
    for (index, (label, count)) in bars.iter().enumerate() {
        let y = TITLE + ROW * index as i32;
        let middle = y + ROW / 2;
        canvas.text(
            label,
            at(LABELS - 8, middle),
            &FONT_7X13,
            INK,
            Alignment::Right,
        );
        let room = f64::from(WIDTH - LABELS - COUNTS);
        let length = (room * *count as f64 / most as f64).round() as u32;
        let bar = Rectangle::new(at(LABELS, y + 2), Size::new(length, ROW as u32 - 4));
        canvas.draw(&bar.into_styled(PrimitiveStyle::with_fill(BAR)));
        let right = at(LABELS + length as i32 + 6, middle);
        canvas.text(&count.to_string(), right, &FONT_7X13, GREY, Alignment::Left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_counts() {
        let bars = |counts: &[u64]| Bars {
            title: "score".to_owned(),
            bars: counts
                .iter()
                .map(|count| ("0 - 1".to_owned(), *count))
                .collect(),
        };
        let image = histograms(&[bars(&[10, 5, 0]), bars(&[]), bars(&[1])]);
        assert_eq!(image.width(), 2 * WIDTH as u32);
        let blue = [BAR.r(), BAR.g(), BAR.b()];
        let length = |row: i32| {
            let y = (TITLE + ROW * row + ROW / 2) as u32;
            (0..WIDTH as u32)
                .filter(|&x| image.get_pixel(x, y).0 == blue)
                .count()
        };
        let room = (WIDTH - LABELS - COUNTS) as usize;
        assert_eq!([0, 1, 2].map(length), [room, room / 2, 0]);
        assert_eq!(histograms(&[]).dimensions(), (1, 1));
    }
}
