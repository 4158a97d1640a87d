//! Curves over training steps: one panel a curve, on a logarithmic scale.

use embedded_graphics::mono_font::ascii::{FONT_7X13, FONT_9X15_BOLD};
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Circle, Line, Polyline, PrimitiveStyle, Rectangle};
use embedded_graphics::text::Alignment;
use image::RgbImage;
use image::imageops::{FilterType, resize};

use super::canvas::{Canvas, GREY, INK, WHITE};

/// Size of a panel. Pixels.
const WIDTH: i32 = 900;
const HEIGHT: i32 = 460;
/// Margins between the panel's edges and the plot. Pixels.
const LEFT: i32 = 76;
const RIGHT: i32 = 24;
const TOP: i32 = 44;
const BOTTOM: i32 = 50;
/// Antialiasing: lines are drawn enlarged by this factor and scaled down.
const OVERSAMPLING: i32 = 3;
/// A curve with fewer points has a dot for each and no smoothed line.
const FEW: usize = 40;
/// The smoothing window has the number of points divided by this.
const SMOOTHING_DIVISOR: usize = 20;

const FRAME: Rgb888 = Rgb888::new(0xc4, 0xc9, 0xcf);
const GRID: Rgb888 = Rgb888::new(0xe8, 0xea, 0xed);
const RAW: Rgb888 = Rgb888::new(0xa9, 0xc8, 0xec);
const LINE: Rgb888 = Rgb888::new(0x1b, 0x5e, 0xb0);
const REFERENCES: [Rgb888; 4] = [
    Rgb888::new(0xc8, 0x4b, 0x1f),
    Rgb888::new(0x2e, 0x85, 0x40),
    Rgb888::new(0x8a, 0x3f, 0xa0),
    Rgb888::new(0x8a, 0x6d, 0x1a),
];

/// One quantity over the steps of a run.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    /// Name of the quantity, with its unit.
    pub title: String,
    /// Step and value. Values that are not finite or not above zero are left out.
    pub points: Vec<(u64, f64)>,
    /// Draw a smoothed line over many points.
    pub smoothed: bool,
    /// Label and value of horizontal reference lines.
    pub references: Vec<(String, f64)>,
}

/// Draws one panel for each curve, from top to bottom, all with the same range of steps.
pub fn curves(curves: &[Curve]) -> RgbImage {
    let last = curves
        .iter()
        .flat_map(|c| &c.points)
        .map(|&(step, _)| step)
        .max();
    let panels: Vec<Panel<'_>> = curves
        .iter()
        .enumerate()
        .map(|(i, curve)| Panel::new(curve, i as i32 * HEIGHT, last.unwrap_or(1).max(1)))
        .collect();
    let height = HEIGHT * panels.len() as i32;
    let mut canvas = Canvas::new(
        (WIDTH * OVERSAMPLING) as u32,
        (height * OVERSAMPLING) as u32,
    );
    for panel in &panels {
        panel.draw_lines(&mut canvas);
    }
    let shrunk = resize(
        &canvas.into_image(),
        WIDTH as u32,
        height as u32,
        FilterType::Triangle,
    );
    let mut canvas = Canvas::over(shrunk);
    for panel in &panels {
        panel.draw_text(&mut canvas);
    }
    canvas.into_image()
}

/// Layout of one curve's panel.
struct Panel<'a> {
    curve: &'a Curve,
    points: Vec<(u64, f64)>,
    references: Vec<&'a (String, f64)>,
    top: i32,
    last: u64,
    /// Base-10 logarithms of the values at the plot's lower and upper edge.
    low: f64,
    high: f64,
}

impl<'a> Panel<'a> {
    fn new(curve: &'a Curve, top: i32, last: u64) -> Self {
        let shown = |value: f64| value.is_finite() && value > 0.0;
        let points: Vec<(u64, f64)> = curve
            .points
            .iter()
            .copied()
            .filter(|p| shown(p.1))
            .collect();
        let references: Vec<_> = curve.references.iter().filter(|r| shown(r.1)).collect();
        let logs = points
            .iter()
            .map(|p| p.1)
            .chain(references.iter().map(|r| r.1))
            .map(f64::log10);
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), log| {
            (low.min(log), high.max(log))
        });
        let (low, high) = if low <= high {
            (low, high)
        } else {
            (-1.0, 0.0)
        };
        let margin = ((high - low) * 0.06).max(0.02);
        Self {
            curve,
            points,
            references,
            top,
            last,
            low: low - margin,
            high: high + margin,
        }
    }

    /// Edges of the plot: left, right, top, bottom. Pixels.
    fn frame(&self) -> [i32; 4] {
        [
            LEFT,
            WIDTH - RIGHT,
            self.top + TOP,
            self.top + HEIGHT - BOTTOM,
        ]
    }

    fn x(&self, step: f64) -> f64 {
        let [left, right, ..] = self.frame().map(f64::from);
        left + (right - left) * step / self.last as f64
    }

    fn y(&self, value: f64) -> f64 {
        let [_, _, top, bottom] = self.frame().map(f64::from);
        bottom - (bottom - top) * (value.log10() - self.low) / (self.high - self.low)
    }

    fn draw_lines(&self, canvas: &mut Canvas) {
        let large = |x: f64, y: f64| {
            let scale = f64::from(OVERSAMPLING);
            Point::new((x * scale).round() as i32, (y * scale).round() as i32)
        };
        let stroke = |color, width: f64| {
            PrimitiveStyle::with_stroke(color, (width * f64::from(OVERSAMPLING)) as u32)
        };
        let [left, right, top, bottom] = self.frame().map(f64::from);
        for value in value_ticks(self.low, self.high) {
            let y = self.y(value).round();
            canvas.draw(&Line::new(large(left, y), large(right, y)).into_styled(stroke(GRID, 1.0)));
        }
        for step in step_ticks(self.last) {
            let x = self.x(step as f64).round();
            canvas.draw(&Line::new(large(x, top), large(x, bottom)).into_styled(stroke(GRID, 1.0)));
        }
        let frame = Rectangle::with_corners(large(left, top), large(right, bottom));
        canvas.draw(&frame.into_styled(stroke(FRAME, 1.0)));
        for ((_, value), color) in self.references.iter().zip(REFERENCES.iter().cycle()) {
            let y = self.y(*value);
            for dash in (0..(right - left) as i32).step_by(10) {
                let from = left + f64::from(dash);
                let to = (from + 6.0).min(right);
                canvas.draw(
                    &Line::new(large(from, y), large(to, y)).into_styled(stroke(*color, 1.4)),
                );
            }
        }
        let position = |&(step, value): &(u64, f64)| large(self.x(step as f64), self.y(value));
        let positions: Vec<Point> = self.points.iter().map(position).collect();
        let smooth = self.curve.smoothed && self.points.len() >= FEW;
        let (color, width) = if smooth { (RAW, 1.0) } else { (LINE, 2.0) };
        canvas.draw(&Polyline::new(&positions).into_styled(stroke(color, width)));
        if smooth {
            let line: Vec<Point> = smoothed(&self.points).iter().map(position).collect();
            canvas.draw(&Polyline::new(&line).into_styled(stroke(LINE, 2.4)));
        } else if self.points.len() < FEW {
            for at in positions {
                let dot = Circle::with_center(at, (7 * OVERSAMPLING) as u32);
                canvas.draw(&dot.into_styled(PrimitiveStyle::with_fill(LINE)));
            }
        }
    }

    fn draw_text(&self, canvas: &mut Canvas) {
        let [left, right, top, bottom] = self.frame();
        let title = Point::new(left, top - 20);
        canvas.text(
            &self.curve.title,
            title,
            &FONT_9X15_BOLD,
            INK,
            Alignment::Left,
        );
        let last_value = match self.points.last() {
            Some(&(step, value)) => format!("log scale   step {step}: {}", short(value)),
            None => "no values".to_owned(),
        };
        canvas.text(
            &last_value,
            Point::new(right, top - 20),
            &FONT_7X13,
            GREY,
            Alignment::Right,
        );
        for value in value_ticks(self.low, self.high) {
            let at = Point::new(left - 8, self.y(value).round() as i32);
            canvas.text(&short(value), at, &FONT_7X13, GREY, Alignment::Right);
        }
        for step in step_ticks(self.last) {
            let at = Point::new(self.x(step as f64).round() as i32, bottom + 13);
            canvas.text(&step.to_string(), at, &FONT_7X13, GREY, Alignment::Center);
        }
        canvas.text(
            "step",
            Point::new(i32::midpoint(left, right), bottom + 33),
            &FONT_7X13,
            INK,
            Alignment::Center,
        );
        self.draw_reference_labels(canvas);
    }

    /// Draws each label at the right end of its line, above it or, where another label is in the way, below it.
    fn draw_reference_labels(&self, canvas: &mut Canvas) {
        let right = self.frame()[1];
        let mut taken: Vec<i32> = Vec::new();
        for ((label, value), color) in self.references.iter().zip(REFERENCES.iter().cycle()) {
            let text = format!("{label}: {}", short(*value));
            let y = self.y(*value).round() as i32;
            let free = |y: &i32| taken.iter().all(|other| (other - y).abs() >= 14);
            let y = [y - 10, y + 10].into_iter().find(free).unwrap_or(y - 10);
            taken.push(y);
            let width = text.chars().count() as u32 * FONT_7X13.character_size.width;
            let corner = Point::new(right - 8 - width as i32, y - 7);
            // A white background keeps the label readable over the curve.
            canvas.draw(
                &Rectangle::new(corner, Size::new(width, 14))
                    .into_styled(PrimitiveStyle::with_fill(WHITE)),
            );
            canvas.text(
                &text,
                Point::new(right - 8, y),
                &FONT_7X13,
                *color,
                Alignment::Right,
            );
        }
    }
}

/// Local linear regression of the logarithms: each value is replaced by the value of a line fitted to it and its neighbours. A mean
/// would bend the ends of the curve.
fn smoothed(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let reach = points.len() / SMOOTHING_DIVISOR / 2 + 1;
    (0..points.len())
        .map(|i| {
            let near = &points[i.saturating_sub(reach)..points.len().min(i + reach + 1)];
            let count = near.len() as f64;
            let at = |p: &(u64, f64)| p.0 as f64 - points[i].0 as f64;
            let (mean_x, mean_y) = near.iter().fold((0.0, 0.0), |(x, y), p| {
                (x + at(p) / count, y + p.1.ln() / count)
            });
            let (covariance, variance) =
                near.iter().fold((0.0, 0.0), |(covariance, variance), p| {
                    let x = at(p) - mean_x;
                    (covariance + x * (p.1.ln() - mean_y), variance + x * x)
                });
            let slope = if variance > 0.0 {
                covariance / variance
            } else {
                0.0
            };
            (points[i].0, (mean_y - slope * mean_x).exp())
        })
        .collect()
}

/// Round values between two base-10 logarithms: powers of ten, with more values between them for a small range.
fn value_ticks(low: f64, high: f64) -> Vec<f64> {
    const MANTISSAS: [&[u32]; 3] = [&[1], &[1, 2, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9]];
    let decades = low.floor() as i32..=high.ceil() as i32;
    for mantissas in MANTISSAS {
        let ticks: Vec<f64> = decades
            .clone()
            .flat_map(|decade| {
                mantissas
                    .iter()
                    .map(move |m| f64::from(*m) * 10f64.powi(decade))
            })
            .filter(|tick| (low..=high).contains(&tick.log10()))
            .collect();
        if ticks.len() >= 4 {
            let each = ticks.len().div_ceil(10);
            return ticks.into_iter().step_by(each).collect();
        }
    }
    let (from, to) = (10f64.powf(low), 10f64.powf(high));
    let step = round_step((to - from) / 5.0);
    let first = (from / step).ceil() as i64;
    (0..20)
        .map(|i| (first + i) as f64 * step)
        .take_while(|&tick| tick <= to)
        .collect()
}

/// Round steps from 0 to the last one.
fn step_ticks(last: u64) -> Vec<u64> {
    let step = round_step(last as f64 / 8.0).max(1.0) as u64;
    (0..=last / step).map(|i| i * step).collect()
}

/// The smallest 1, 2 or 5 times a power of ten that is not below `least`.
fn round_step(least: f64) -> f64 {
    let decade = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0]
        .into_iter()
        .map(|m| m * decade)
        .find(|&step| step >= least);
    step.unwrap_or(10.0 * decade)
}

/// A number with about three significant digits.
fn short(value: f64) -> String {
    if (1e-3..1e5).contains(&value) {
        let decimals = (2 - value.log10().floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.decimals$}");
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text
        }
    } else {
        let text = format!("{value:.2e}");
        text.replace(".00e", "e").replace("0e", "e")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_in_range() {
        assert_eq!(value_ticks(-3.0, 1.0).len(), 5);
        let near = value_ticks(0.7f64.log10(), 3.1f64.log10());
        assert_eq!(
            near.iter().map(|t| short(*t)).collect::<Vec<_>>(),
            ["0.7", "0.8", "0.9", "1", "2", "3"]
        );
        let nearer: Vec<String> = value_ticks(0.501f64.log10(), 0.55f64.log10())
            .into_iter()
            .map(short)
            .collect();
        assert_eq!(nearer, ["0.51", "0.52", "0.53", "0.54", "0.55"]);
        assert!(value_ticks(-40.0, 40.0).len() <= 10);
        assert_eq!(step_ticks(250), [0, 50, 100, 150, 200, 250]);
        assert_eq!(step_ticks(1), [0, 1]);
    }

    #[test]
    fn numbers_are_short() {
        let short: Vec<String> = [0.012_345, 1.0, 250.0, 1234.5, 0.000_02, 123_456.0]
            .into_iter()
            .map(short)
            .collect();
        assert_eq!(short, ["0.0123", "1", "250", "1234", "2e-5", "1.23e5"]);
    }

    #[test]
    fn smoothing_keeps_a_straight_line() {
        let line: Vec<(u64, f64)> = (0..100)
            .map(|i| (i, 10f64.powf(-(i as f64) / 50.0)))
            .collect();
        for (smooth, raw) in smoothed(&line).iter().zip(&line) {
            assert!((smooth.1 / raw.1 - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn curves_leave_out_values_without_a_logarithm() {
        let curve = Curve {
            title: "loss".to_owned(),
            points: vec![(1, f64::NAN), (2, 0.0), (3, -1.0), (4, f64::INFINITY)],
            smoothed: true,
            references: vec![("none".to_owned(), 0.0)],
        };
        let empty = curves(&[curve, Curve::default()]);
        assert_eq!(empty.dimensions(), (WIDTH as u32, 2 * HEIGHT as u32));
        let colours = [RAW, LINE, REFERENCES[0]].map(|c| [c.r(), c.g(), c.b()]);
        assert!(empty.pixels().all(|p| !colours.contains(&p.0)));
    }

    #[test]
    fn curves_and_references_are_drawn() {
        let curve = Curve {
            title: "endpoint error".to_owned(),
            points: (0..6).map(|i| (i * 50, 1.9 / (i + 1) as f64)).collect(),
            smoothed: false,
            references: vec![
                ("teacher, 1 step".to_owned(), 1.91),
                ("teacher, 4 steps".to_owned(), 0.13),
            ],
        };
        let image = curves(&[curve]);
        assert_eq!(image.dimensions(), (WIDTH as u32, HEIGHT as u32));
        for color in [LINE, REFERENCES[0], REFERENCES[1]] {
            assert!(
                image
                    .pixels()
                    .any(|p| p.0 == [color.r(), color.g(), color.b()])
            );
        }
    }
}
