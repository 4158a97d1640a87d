//! Dynamic quantisation: numbers of [-1, 1] in 8 bits, close together near zero.
//!
//! Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561); the values are those of bitsandbytes'
//! `create_dynamic_map`.

use std::sync::LazyLock;

/// Decades below 1 that the map covers.
const DECADES: u32 = 7;

/// 256 values in ascending order, and a table to find the nearest one.
#[derive(Debug)]
pub(super) struct DynamicMap {
    values: [f32; 256],
    /// Half way between each value and the next; infinite after the last one.
    middles: [f32; 256],
    /// By the upper half of a number's bits: the code of the least number with that half.
    first: Vec<u8>,
}

/// The map of numbers in [-1, 1].
pub(super) static SIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(true));
/// The map of numbers in [0, 1].
pub(super) static UNSIGNED: LazyLock<DynamicMap> = LazyLock::new(|| DynamicMap::new(false));

impl DynamicMap {
    fn new(signed: bool) -> Self {
        let mut found = vec![0.0, 1.0];
        for decade in 0..DECADES {
            let items = if signed { 1 << decade } else { 2 << decade };
            let scale = 10f64.powi(decade as i32 - 6) as f32;
            for i in 0..items {
                let mean = scale * ((end(i, items) + end(i + 1, items)) / 2.0);
                found.push(mean);
                if signed {
                    found.push(-mean);
                }
            }
        }
        found.sort_by(f32::total_cmp);
        let mut values = [0.0; 256];
        values.copy_from_slice(&found);
        let mut middles = [f32::INFINITY; 256];
        for (middle, pair) in middles.iter_mut().zip(values.windows(2)) {
            *middle = (pair[0] + pair[1]) / 2.0;
        }
        let first = |upper: u32| {
            let negative = upper & 0x8000 != 0;
            // The least negative number of a half has all lower bits set.
            let least = f32::from_bits(upper << 16 | if negative { 0xffff } else { 0 });
            middles.partition_point(|&middle| middle < least).min(255) as u8
        };
        Self {
            values,
            middles,
            first: (0..1 << 16).map(first).collect(),
        }
    }

    /// The value of a code.
    #[inline(always)]
    pub(super) fn value(&self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    /// The code of the value nearest to `x`, of two equally near ones the lower.
    #[inline(always)]
    pub(super) fn nearest(&self, x: f32) -> u8 {
        let mut code = self.first[(x.to_bits() >> 16) as usize];
        while x > self.middles[usize::from(code)] {
            code += 1;
        }
        code
    }

    pub(super) fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// Half way between each value and the next; infinite after the last one.
    pub(super) fn middles(&self) -> &[f32; 256] {
        &self.middles
    }
}

/// The `i`-th of the ends of `items` equal parts of [0.1, 1], as `torch.linspace` rounds it: from the nearer end.
fn end(i: u32, items: u32) -> f32 {
    let width = (1.0f32 - 0.1) / items as f32;
    if i < items.div_ceil(2) {
        width.mul_add(i as f32, 0.1)
    } else {
        (-width).mul_add((items - i) as f32, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_map_finds_the_nearest_value() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let nearest = |x: f32| map.middles.partition_point(|&m| m < x) as u8;
            for &middle in &map.middles[..255] {
                for x in [middle, middle.next_up(), middle.next_down()] {
                    assert_eq!(map.nearest(x), nearest(x), "{x}");
                }
            }
            for (code, &value) in map.values.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(value)), code);
            }
            for x in [0.0, -0.0, 1.0, -1.0, f32::MIN_POSITIVE, 1e-30, -1e-30] {
                assert_eq!(map.nearest(x), nearest(x), "{x}");
            }
        }
    }
}
