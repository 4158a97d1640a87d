//! An image as a drawing target of `embedded-graphics`, and text in its fonts.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::mono_font::{MonoFont, MonoTextStyle};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::text::{Alignment, Baseline, Text, TextStyleBuilder};
use image::{Rgb, RgbImage};

pub(super) const WHITE: Rgb888 = Rgb888::WHITE;
pub(super) const INK: Rgb888 = Rgb888::new(0x22, 0x26, 0x2b);
pub(super) const GREY: Rgb888 = Rgb888::new(0x6b, 0x72, 0x7a);

/// A drawing target of `embedded-graphics`; pixels outside the image are ignored.
pub(super) struct Canvas {
    image: RgbImage,
}

impl Canvas {
    pub(super) fn new(width: u32, height: u32) -> Self {
        Self::over(RgbImage::from_pixel(width, height, Rgb([255; 3])))
    }

    pub(super) fn over(image: RgbImage) -> Self {
        Self { image }
    }

    pub(super) fn into_image(self) -> RgbImage {
        self.image
    }

    /// Copies an image; `at` is its upper left corner.
    pub(super) fn paste(&mut self, picture: &RgbImage, at: Point) {
        image::imageops::replace(&mut self.image, picture, at.x.into(), at.y.into());
    }

    pub(super) fn draw(&mut self, what: &impl Drawable<Color = Rgb888>) {
        let Ok(_) = what.draw(self);
    }

    /// Draws one line of text, aligned horizontally and centred vertically at `at`.
    pub(super) fn text(
        &mut self,
        text: &str,
        at: Point,
        font: &MonoFont<'_>,
        color: Rgb888,
        alignment: Alignment,
    ) {
        let style = TextStyleBuilder::new()
            .alignment(alignment)
            .baseline(Baseline::Middle)
            .build();
        let text = ascii(text);
        self.draw(&Text::with_text_style(
            &text,
            at,
            MonoTextStyle::new(font, color),
            style,
        ));
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(self.image.width(), self.image.height())
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) else {
                continue;
            };
            if let Some(pixel) = self.image.get_pixel_mut_checked(x, y) {
                *pixel = Rgb([color.r(), color.g(), color.b()]);
            }
        }
        Ok(())
    }
}

/// Replaces characters that the fonts lack by `?`.
fn ascii(text: &str) -> String {
    let printable = |c: char| c == ' ' || c.is_ascii_graphic();
    text.chars()
        .map(|c| match c {
            c if printable(c) => c,
            c if c.is_whitespace() => ' ',
            _ => '?',
        })
        .collect()
}

/// Wraps text to lines of at most `columns` characters, between words where possible. Text beyond `rows` lines is replaced
/// by dots.
pub(super) fn wrap(text: &str, columns: usize, rows: usize) -> Vec<String> {
    let columns = columns.max(4);
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let line = lines.last_mut().map_or(0, |line| line.chars().count());
            let gap = usize::from(line > 0);
            if line + gap + word.len() <= columns {
                if let Some(last) = lines.last_mut() {
                    last.extend((gap > 0).then_some(' '));
                    last.extend(&word);
                }
                break;
            }
            if line > 0 {
                lines.push(String::new());
            } else {
                let rest = word.split_off(columns);
                lines.pop();
                lines.extend([word.iter().collect(), String::new()]);
                word = rest;
            }
        }
    }
    if lines.len() > rows {
        lines.truncate(rows.max(1));
        if let Some(last) = lines.last_mut() {
            let kept: String = last.chars().take(columns - 3).collect();
            *last = format!("{}...", kept.trim_end());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrap_breaks_at_words_and_truncates() {
        assert_eq!(wrap("a red apple", 6, 3), ["a red", "apple"]);
        assert_eq!(
            wrap("antidisestablishment now", 8, 5),
            ["antidise", "stablish", "ment now"]
        );
        assert_eq!(wrap("one two three four", 7, 2), ["one two", "thre..."]);
        assert_eq!(wrap("", 10, 2), [""]);
        assert_eq!(wrap("abcdefgh", 8, 1), ["abcdefgh"]);
    }

    #[test]
    fn ascii_replaces_other_characters() {
        assert_eq!(ascii("na\u{ef}ve\ncaf\u{e9} \u{1f600}"), "na?ve caf? ?");
    }

    #[test]
    fn canvas_ignores_pixels_outside() {
        let mut canvas = Canvas::new(4, 4);
        let pixels = [(-1, 0), (0, 9), (2, 2)].map(|(x, y)| Pixel(Point::new(x, y), Rgb888::BLACK));
        let Ok(()) = canvas.draw_iter(pixels);
        let image = canvas.into_image();
        assert_eq!(image.pixels().filter(|p| p.0 == [0; 3]).count(), 1);
        assert_eq!(image.get_pixel(2, 2).0, [0; 3]);
    }
}
