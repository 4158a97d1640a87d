//! Sums, dot products and maxima of slices, in an order that depends on their lengths alone.

use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::real::{Real, real};

/// Independent partial sums, which a vector unit holds; fixed, so that sums do not depend on its width.
const LANES: usize = 16;
/// Elements that are summed in `T` before the partial sum is added in `f64`.
const BLOCK: usize = 1024;

/// The sum of the lanes, by halves: few dependent steps.
#[inline(always)]
fn add_lanes<T: Real>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `Σ f(x, y)` over two slices of equal length, accumulated in `f64` block by block.
#[inline(always)]
pub(super) fn sum2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> f64 {
    let mut total = 0.0;
    for (x, y) in x.chunks(BLOCK).zip(y.chunks(BLOCK)) {
        let mut lanes = [T::zero(); LANES];
        let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
        let rest = xs
            .remainder()
            .iter()
            .zip(ys.remainder())
            .fold(T::zero(), |acc, (&x, &y)| acc + f(x, y));
        for (x, y) in xs.zip(ys) {
            for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
                *lane += f(x, y);
            }
        }
        total += (rest + add_lanes(lanes)).to_f64();
    }
    total
}

/// `Σ f(x)`, as [`sum2`].
#[inline(always)]
pub(super) fn sum1<T: Real>(x: &[T], f: impl Fn(T) -> T) -> f64 {
    sum2(x, x, |x, _| f(x))
}

/// The largest element; unspecified if one is NaN.
#[inline(always)]
pub(super) fn max<T: Real>(x: &[T]) -> T {
    let larger = |a: T, b: T| if b > a { b } else { a };
    let mut lanes = [T::neg_infinity(); LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = larger(*lane, x);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = larger(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    rest.iter().copied().fold(lanes[0], larger)
}

/// Replaces each `x` by `f(x)`; the sum of the results, in lanes of `T`.
#[inline(always)]
pub(super) fn map_and_sum<T: Real>(x: &mut [T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for x in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *x = f(*x);
            *lane += *x;
        }
    }
    // The rest through a whole vector: `f` is slow and would run one element at a time.
    let rest = chunks.into_remainder();
    let mut padded = [T::zero(); LANES];
    padded[..rest.len()].copy_from_slice(rest);
    for x in &mut padded {
        *x = f(*x);
    }
    rest.copy_from_slice(&padded[..rest.len()]);
    for (lane, &x) in lanes.iter_mut().zip(&*rest) {
        *lane += x;
    }
    add_lanes(lanes)
}

/// `Σ x·y`, in lanes of `T`.
#[inline(always)]
pub(super) fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder());
    for (lane, (&x, &y)) in lanes.iter_mut().zip(rest) {
        *lane += x * y;
    }
    for (x, y) in xs.zip(ys) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    add_lanes(lanes)
}

/// Sums the rows of `x` `[rows, width]`: `[width]`. Blocks of `block` rows are summed in `T`, then added in `f64` in order.
pub(super) fn sum_rows<T: Real>(x: &[T], width: usize, block: usize) -> Vec<T> {
    let mut total = vec![0f64; width];
    let mut part = vec![T::zero(); width];
    for rows in x.chunks(block * width) {
        part.fill(T::zero());
        add_rows(rows, &mut part);
        for (t, p) in total.iter_mut().zip(&part) {
            *t += (*p).to_f64();
        }
    }
    total.into_iter().map(real).collect()
}

/// Adds the rows of `x` to `total`.
#[pulp::with_simd(add_rows = Arch::new())]
#[inline(always)]
fn add_rows_on<S: Simd, T: Real>(_: S, x: &[T], total: &mut [T]) {
    for row in x.chunks_exact(total.len()) {
        for (t, &x) in total.iter_mut().zip(row) {
            *t += x;
        }
    }
}

/// Sums `x` `[batch, channels, pixels]` over images and pixels: `[channels]`.
pub(super) fn sum_planes<T: Real>(x: &[T], batch: usize, channels: usize, pixels: usize) -> Vec<T> {
    let channel = |c: usize| -> f64 {
        let planes = (0..batch).map(|b| &x[(b * channels + c) * pixels..][..pixels]);
        planes.map(sum).sum()
    };
    (0..channels)
        .into_par_iter()
        .map(|c| real(channel(c)))
        .collect()
}

#[pulp::with_simd(sum = Arch::new())]
#[inline(always)]
fn sum_on<S: Simd, T: Real>(_: S, x: &[T]) -> f64 {
    sum1(x, |x| x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_cover_blocks_lanes_and_rest() {
        let x: Vec<f32> = (0..2 * BLOCK + LANES + 3).map(|i| i as f32).collect();
        let want: f64 = x.iter().map(|&x| x as f64).sum();
        assert!((sum1(&x, |x| x) - want).abs() / want < 1e-7);
    }
}
