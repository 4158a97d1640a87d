//! Component planes of a JPEG at full size, as libjpeg makes them ("fancy upsampling"), and its conversion of colours.
//!
//! For JPEGs whose first component (luma, or cyan) is not the most finely sampled one, or whose black is sampled in another way. The
//! decoder refuses or distorts them; libjpeg upsamples any component.

use libjpeg_turbo_rs::RawImage;

/// A component's samples at its own resolution. Rows below and columns to the right of the image are not part of it.
struct Plane<'a> {
    samples: &'a [u8],
    stride: usize,
    width: usize,
    height: usize,
}

impl Plane<'_> {
    /// A row; beyond the edges the nearest one.
    fn row(&self, y: isize) -> &[u8] {
        let y = usize::try_from(y).unwrap_or(0).min(self.height - 1);
        &self.samples[y * self.stride..][..self.width]
    }
}

/// Horizontal and vertical sampling factors of a component.
pub(super) type Sampling = (usize, usize);

/// The components' samples at the size of the image, in order. `None` if a factor does not divide the greatest one, or a
/// plane is too small.
pub(super) fn full_size(raw: &RawImage, factors: &[Sampling]) -> Option<Vec<Vec<u8>>> {
    let most = factors.iter().fold((1, 1), |most, factor| {
        (most.0.max(factor.0), most.1.max(factor.1))
    });
    let component = |(index, factor): (usize, &Sampling)| {
        if most.0 % factor.0 != 0 || most.1 % factor.1 != 0 {
            return None;
        }
        let plane = Plane {
            samples: raw.planes.get(index)?,
            stride: *raw.plane_widths.get(index)?,
            width: (raw.width * factor.0).div_ceil(most.0),
            height: (raw.height * factor.1).div_ceil(most.1),
        };
        if plane.width > plane.stride || plane.height * plane.stride > plane.samples.len() {
            return None;
        }
        let expansion = (most.0 / factor.0, most.1 / factor.1);
        Some(upsampled(&plane, expansion, raw.width, raw.height))
    };
    factors.iter().enumerate().map(component).collect()
}

/// RGB of luma and chroma, in fixed point with 16 bits.
pub(super) fn colour([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let level = |value: i32| u8::try_from(value.clamp(0, 255)).unwrap_or(u8::MAX);
    [
        level(y + ((91_881 * cr + HALF) >> 16)),
        level(y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16)),
        level(y + ((116_130 * cb + HALF) >> 16)),
    ]
}

/// The samples at the size of the image, `width * height`. `expansion`: across and down.
fn upsampled(plane: &Plane<'_>, expansion: Sampling, width: usize, height: usize) -> Vec<u8> {
    let mut samples = Vec::with_capacity(width * height);
    let (across, down) = expansion;
    for y in 0..height {
        let at = (y / down).cast_signed();
        // The nearer of the rows above and below.
        let other = if y % 2 == 0 { at - 1 } else { at + 1 };
        let near = plane.row(at);
        // libjpeg replicates the samples of planes too narrow to interpolate, and those of other expansions.
        let mut row: Vec<u8> = match expansion {
            (2, 1) if plane.width > 2 => doubled(near.iter().map(|&s| u32::from(s)), [1, 2], 2),
            (2, 2) if plane.width > 2 => {
                let sums = near.iter().zip(plane.row(other));
                let sums = sums.map(|(&a, &b)| 3 * u32::from(a) + u32::from(b));
                doubled(sums, [8, 7], 4)
            }
            (1, 2) => {
                let bias = if y % 2 == 0 { 1 } else { 2 };
                let pairs = near.iter().zip(plane.row(other));
                let mixed =
                    |(&a, &b): (&u8, &u8)| narrow((3 * u32::from(a) + u32::from(b) + bias) >> 2);
                pairs.map(mixed).collect()
            }
            _ => {
                let repeat = |&sample: &u8| std::iter::repeat_n(sample, across);
                near.iter().flat_map(repeat).collect()
            }
        };
        row.truncate(width);
        samples.extend(row);
    }
    samples
}

/// Two samples for each: three parts of it and one part of the neighbour on that side. At the ends four parts of the sample itself.
/// The sums have `shift` bits of fraction; `biases` are added before they are removed, left and right.
fn doubled(sums: impl Iterator<Item = u32>, biases: [u32; 2], shift: u32) -> Vec<u8> {
    let sums: Vec<u32> = sums.collect();
    let mixed = |at: usize, neighbour: Option<&u32>, bias: u32| {
        let near = sums[at];
        narrow((3 * near + neighbour.unwrap_or(&near) + bias) >> shift)
    };
    let both = |at: usize| {
        let left = at.checked_sub(1).and_then(|left| sums.get(left));
        [
            mixed(at, left, biases[0]),
            mixed(at, sums.get(at + 1), biases[1]),
        ]
    };
    (0..sums.len()).flat_map(both).collect()
}

fn narrow(value: u32) -> u8 {
    u8::try_from(value).unwrap_or(u8::MAX)
}
