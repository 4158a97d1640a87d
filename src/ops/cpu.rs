//! What the CPU kernels share: the element trait, scratch memory, sums.
//!
//! Loops over elements are functions marked `pulp::with_simd`: compiled once for each vector unit, with everything
//! `#[inline(always)]` below them, and chosen by the machine. A closure would be compiled for the baseline alone.

use std::cell::RefCell;

use candle_core::WithDType;

/// An element type the CPU kernels are written for: `f32`, and `f64` for checking them.
pub(super) trait Real:
    WithDType + num_traits::Float + num_traits::FloatConst + Default + std::iter::Sum
{
    /// `e^x`, accurate to about one unit in the last place; NaN stays NaN.
    fn fast_exp(self) -> Self;
    /// The error function.
    fn fast_erf(self) -> Self;
    /// Runs `work` on a buffer of `len` elements of unspecified content, kept by this thread for the next caller.
    fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [Self]) -> R) -> R;
}

/// A constant in any element type.
pub(super) fn real<T: Real>(x: f64) -> T {
    T::from_f64(x)
}

macro_rules! scratch {
    ($ty:ty) => {
        fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [Self]) -> R) -> R {
            thread_local!(static BUFFERS: RefCell<Vec<Vec<$ty>>> = const { RefCell::new(Vec::new()) });
            // The buffer is taken out, not borrowed: rayon may run another task on this thread inside `work`.
            let mut buffer = BUFFERS.with(|b| b.borrow_mut().pop()).unwrap_or_default();
            if buffer.len() < len {
                buffer.resize(len, Self::default());
            }
            let result = work(&mut buffer[..len]);
            BUFFERS.with(|b| b.borrow_mut().push(buffer));
            result
        }
    };
}

impl Real for f32 {
    // Branch-free so that it vectorises; fused products, which every machine with AVX2 or NEON has. Range reduction and minimax polynomial as in Cephes' expf.
    #[inline(always)]
    fn fast_exp(self) -> f32 {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits
        let x = if self < -87.0 { -87.0 } else { self }; // comparisons, not min/max: NaN must pass
        let x = if x > 88.0 { 88.0 } else { x };
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-0.693_359_4, x);
        let r = n.mul_add(2.121_944_4e-4, r);
        let p = r.mul_add(1.987_569_1e-4, 1.398_199_9e-3);
        let p = p.mul_add(r, 8.333_452e-3);
        let p = p.mul_add(r, 4.166_579_6e-2);
        let p = p.mul_add(r, 1.666_666_5e-1);
        let p = p.mul_add(r, 0.5);
        let exponent = shifted
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .wrapping_add(127);
        ((p * r).mul_add(r, r) + 1.0) * f32::from_bits(exponent << 23)
    }

    // Rational approximation on [-4, 4], the one Eigen and XLA use; beyond it erf is 1 in f32.
    #[inline(always)]
    fn fast_erf(self) -> f32 {
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let z = x * x;
        let p = z.mul_add(-2.726_142_3e-10, 2.770_681_4e-8);
        let p = p.mul_add(z, -2.101_024e-6);
        let p = p.mul_add(z, -5.692_506_4e-5);
        let p = p.mul_add(z, -7.349_906_3e-4);
        let p = p.mul_add(z, -2.954_6e-3);
        let p = p.mul_add(z, -1.609_603_3e-2);
        let q = z.mul_add(-1.456_607_2e-5, -2.133_740_6e-4);
        let q = q.mul_add(z, -1.682_827e-3);
        let q = q.mul_add(z, -7.373_329_2e-3);
        let q = q.mul_add(z, -1.426_473_9e-2);
        x * p / q
    }

    scratch!(f32);
}

impl Real for f64 {
    #[inline(always)]
    fn fast_exp(self) -> f64 {
        self.exp()
    }

    #[inline(always)]
    fn fast_erf(self) -> f64 {
        libm::erf(self)
    }

    scratch!(f64);
}

/// Logistic function.
#[inline(always)]
pub(super) fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + (-x).fast_exp())
}

/// Independent partial sums a vector unit can hold; fixed, so that sums do not depend on the machine's width.
const LANES: usize = 16;
/// Elements summed in `T` before the partial sum is moved to `f64`.
const BLOCK: usize = 1024;

/// The sum of the lanes, by halves: few steps one after the other.
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

/// The largest element; a NaN may or may not be passed over.
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
    // The rest through a whole vector: `f` is dear and would run one element at a time.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_keeps_nan() {
        let mut worst = 0f64;
        for i in -8600..8790 {
            let x = i as f32 * 0.01;
            let want = (x as f64).exp();
            worst = worst.max(((x.fast_exp() as f64 - want) / want).abs());
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert!(f32::NAN.fast_exp().is_nan());
        assert!(f32::NEG_INFINITY.fast_exp() < 1e-37);
    }

    #[test]
    fn erf_is_accurate_and_keeps_nan() {
        let mut worst = 0f64;
        for i in -600..600 {
            let x = i as f32 * 0.01;
            worst = worst.max((x.fast_erf() as f64 - libm::erf(x as f64)).abs());
        }
        assert!(worst < 5e-7, "{worst}");
        assert!(f32::NAN.fast_erf().is_nan());
    }

    #[test]
    fn sums_cover_blocks_lanes_and_rest() {
        let x: Vec<f32> = (0..2 * BLOCK + LANES + 3).map(|i| i as f32).collect();
        let want: f64 = x.iter().map(|&x| x as f64).sum();
        assert!((sum1(&x, |x| x) - want).abs() / want < 1e-7);
    }
}
