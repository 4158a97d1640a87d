//! Grids of images, with or without labels.

use embedded_graphics::mono_font::MonoFont;
use embedded_graphics::mono_font::ascii::{FONT_7X13, FONT_7X13_BOLD};
use embedded_graphics::prelude::*;
use embedded_graphics::text::Alignment;
use image::imageops::{FilterType, resize};
use image::{Rgb, RgbImage};

use super::canvas::{Canvas, INK, wrap};

/// Images smaller than this are enlarged by a whole factor. Pixels.
const READABLE: u32 = 128;
/// Space between and around images. Pixels.
const GAP: u32 = 6;
/// Width of the row labels. Pixels.
const LABEL_WIDTH: u32 = 150;
/// Line height of a label. Pixels.
const LINE: u32 = 15;
/// Maximum number of lines of a column label.
const COLUMN_LINES: usize = 2;

/// A grid on white with a label left of each row and above each column. Small images are enlarged by a whole factor. Empty
/// label lists take no space.
pub fn grid(rows: &[Vec<RgbImage>], row_labels: &[String], column_labels: &[String]) -> RgbImage {
    let (width, height) = largest(rows.iter().flatten());
    let factor = READABLE.div_ceil(width.max(height).max(1));
    let (width, height) = (width * factor, height * factor);
    let columns = rows
        .iter()
        .map(Vec::len)
        .max()
        .unwrap_or(0)
        .max(column_labels.len()) as u32;
    let column_labels: Vec<Vec<String>> = column_labels
        .iter()
        .map(|label| wrap(label, columns_in(width, &FONT_7X13_BOLD), COLUMN_LINES))
        .collect();
    let header_lines = column_labels.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let left = if row_labels.is_empty() {
        GAP
    } else {
        LABEL_WIDTH + 2 * GAP
    };
    let top = if header_lines == 0 {
        GAP
    } else {
        header_lines * LINE + 2 * GAP
    };
    let mut canvas = Canvas::new(
        left + columns * (width + GAP),
        top + rows.len() as u32 * (height + GAP),
    );
    let corner = |row: usize, column: usize| {
        let x = left + column as u32 * (width + GAP);
        let y = top + row as u32 * (height + GAP);
        Point::new(x as i32, y as i32)
    };
    for (column, lines) in column_labels.iter().enumerate() {
        // Labels are aligned at the bottom.
        let above = (header_lines as i32 - lines.len() as i32) * LINE as i32;
        let at = Point::new(corner(0, column).x + width as i32 / 2, GAP as i32 + above);
        label(&mut canvas, lines, at, &FONT_7X13_BOLD, Alignment::Center);
    }
    for (row, pictures) in rows.iter().enumerate() {
        if let Some(text) = row_labels.get(row) {
            let lines = wrap(
                text,
                columns_in(LABEL_WIDTH, &FONT_7X13),
                (height / LINE).max(1) as usize,
            );
            let above = (height as i32 - lines.len() as i32 * LINE as i32) / 2;
            let at = Point::new((LABEL_WIDTH + GAP) as i32, corner(row, 0).y + above);
            label(&mut canvas, &lines, at, &FONT_7X13, Alignment::Right);
        }
        for (column, picture) in pictures.iter().enumerate() {
            let (w, h) = (picture.width() * factor, picture.height() * factor);
            let picture = match factor {
                1 => picture.clone(),
                _ => resize(picture, w, h, FilterType::Nearest),
            };
            canvas.paste(&picture, corner(row, column));
        }
    }
    canvas.into_image()
}

/// Images in rows of `columns`, without gaps and unscaled: a single image is returned unchanged.
pub fn plain_grid(pictures: &[RgbImage], columns: usize) -> RgbImage {
    let columns = columns.clamp(1, pictures.len().max(1));
    let (width, height) = largest(pictures.iter());
    let rows = pictures.len().div_ceil(columns);
    let mut all = RgbImage::from_pixel(width * columns as u32, height * rows as u32, Rgb([255; 3]));
    for (i, picture) in pictures.iter().enumerate() {
        let x = (i % columns) as i64 * i64::from(width);
        let y = (i / columns) as i64 * i64::from(height);
        image::imageops::replace(&mut all, picture, x, y);
    }
    all
}

fn largest<'a>(pictures: impl Iterator<Item = &'a RgbImage>) -> (u32, u32) {
    pictures.fold((0, 0), |(width, height), picture| {
        (width.max(picture.width()), height.max(picture.height()))
    })
}

fn columns_in(width: u32, font: &MonoFont<'_>) -> usize {
    (width / (font.character_size.width + font.character_spacing)) as usize
}

/// Draws lines of text; `at` is the top of the first line.
fn label(
    canvas: &mut Canvas,
    lines: &[String],
    at: Point,
    font: &MonoFont<'_>,
    alignment: Alignment,
) {
    for (i, line) in lines.iter().enumerate() {
        let middle = at + Point::new(0, i as i32 * LINE as i32 + LINE as i32 / 2);
        canvas.text(line, middle, font, INK, alignment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, shade: u8) -> RgbImage {
        RgbImage::from_pixel(width, height, Rgb([shade, 0, 0]))
    }

    fn count(image: &RgbImage, shade: u8) -> usize {
        image.pixels().filter(|p| p.0 == [shade, 0, 0]).count()
    }

    #[test]
    fn grid_enlarges_small_images_by_a_whole_factor() {
        let rows = [
            vec![picture(64, 64, 200), picture(64, 64, 100)],
            vec![picture(64, 64, 50)],
        ];
        let labels = [
            "one".to_owned(),
            "a label longer than fits beside the picture, of many words".repeat(9),
        ];
        let image = grid(
            &rows,
            &labels,
            &["teacher".to_owned(), "student".to_owned()],
        );
        assert_eq!(image.width(), LABEL_WIDTH + 2 * GAP + 2 * (128 + GAP));
        assert_eq!(image.height(), LINE + 2 * GAP + 2 * (128 + GAP));
        for shade in [200, 100, 50] {
            assert_eq!(count(&image, shade), 128 * 128);
        }
    }

    #[test]
    fn grid_keeps_the_size_of_large_images() {
        let image = grid(&[vec![picture(130, 100, 200)]], &[], &[]);
        assert_eq!(image.dimensions(), (130 + 2 * GAP, 100 + 2 * GAP));
        assert_eq!(count(&image, 200), 130 * 100);
    }

    #[test]
    fn empty_grids_are_drawn() {
        assert_eq!(grid(&[], &[], &[]).dimensions(), (GAP, GAP));
        assert_eq!(plain_grid(&[], 3).dimensions(), (0, 0));
    }

    #[test]
    fn plain_grid_keeps_a_single_image() {
        let one = picture(5, 7, 10);
        assert_eq!(plain_grid(std::slice::from_ref(&one), 4), one);
        let five: Vec<RgbImage> = (1..=5).map(|i| picture(5, 7, i)).collect();
        let all = plain_grid(&five, 2);
        assert_eq!(all.dimensions(), (10, 21));
        assert_eq!(
            (
                all.get_pixel(9, 13).0[0],
                all.get_pixel(0, 20).0[0],
                all.get_pixel(9, 20).0
            ),
            (4, 5, [255; 3])
        );
    }
}
