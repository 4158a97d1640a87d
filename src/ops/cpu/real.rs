//! The element types of the kernels, their elementary functions and scratch memory.

use std::cell::RefCell;

use candle_core::WithDType;

/// An element type that the kernels compute in: `f32`, and `f64` for checks.
pub(super) trait Real:
    WithDType + num_traits::Float + num_traits::FloatConst + Default + std::iter::Sum
{
    /// `e^x`, accurate to about one unit in the last place; NaN stays NaN.
    fn fast_exp(self) -> Self;
    /// The error function.
    fn fast_erf(self) -> Self;
    /// Runs `work` on a buffer of `len` elements of unspecified content. The thread keeps the buffer for the next caller.
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
    // Branch-free so that it vectorises; fused products, which every machine with AVX2 or NEON has. Range reduction and
    // minimax polynomial as in Cephes' expf.
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

    // The rational approximation on [-4, 4] of Eigen and XLA; beyond it erf is 1 in f32.
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
}
