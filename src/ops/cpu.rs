//! What the CPU kernels share: the element trait, views of tensors, scratch memory, vectorised functions.

use std::cell::RefCell;

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};

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
    // Branch-free so that it vectorises. Range reduction and minimax polynomial as in Cephes' expf.
    #[inline(always)]
    fn fast_exp(self) -> f32 {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer held in the low bits
        let x = if self < -87.0 { -87.0 } else { self }; // comparisons, not min/max: NaN must pass
        let x = if x > 88.0 { 88.0 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
        let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2)
            * r
            + 1.666_666_5e-1)
            * r
            + 0.5;
        let exponent = shifted
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .wrapping_add(127);
        (p * r * r + r + 1.0) * f32::from_bits(exponent << 23)
    }

    // Rational approximation on [-4, 4], the one Eigen and XLA use; beyond it erf is 1 in f32.
    #[inline(always)]
    fn fast_erf(self) -> f32 {
        let x = if self < -4.0 { -4.0 } else { self };
        let x = if x > 4.0 { 4.0 } else { x };
        let z = x * x;
        let p = (((((-2.726_142_3e-10 * z + 2.770_681_4e-8) * z - 2.101_024e-6) * z
            - 5.692_506_4e-5)
            * z
            - 7.349_906_3e-4)
            * z
            - 2.954_6e-3)
            * z
            - 1.609_603_3e-2;
        let q = (((-1.456_607_2e-5 * z - 2.133_740_6e-4) * z - 1.682_827e-3) * z - 7.373_329_2e-3)
            * z
            - 1.426_473_9e-2;
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

/// Runs a loop compiled for the widest vector unit of this machine.
///
/// The loop must be in the closure or in `#[inline(always)]` functions called from it.
#[inline(always)]
pub(super) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// Independent partial sums a vector unit can hold; fixed, so that sums do not depend on the machine's width.
const LANES: usize = 16;
/// Elements summed in `T` before the partial sum is moved to `f64`.
const BLOCK: usize = 1024;

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
        total += lanes.iter().fold(rest, |acc, &lane| acc + lane).to_f64();
    }
    total
}

/// `Σ f(x)`, as [`sum2`].
#[inline(always)]
pub(super) fn sum1<T: Real>(x: &[T], f: impl Fn(T) -> T) -> f64 {
    sum2(x, x, |x, _| f(x))
}

/// The elements of a contiguous operand of a custom op.
pub(super) fn slice<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("an operand of a coffey operation must be contiguous"),
    }
}

/// A contiguous CPU tensor, readable as a slice while this lives.
pub(super) struct View<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> View<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(super) fn slice<T: Real>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => slice(storage, self.layout),
            _ => bail!("expected a CPU tensor"),
        }
    }
}

/// What the backward of an operation on three tensors gives: a gradient for each that needs one.
pub(super) type Grads3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// Whether a gradient for `tensor` would reach a variable.
pub(super) fn needs_grad(tensor: &Tensor) -> bool {
    tensor.track_op()
}

/// Calls `$f::<f32>` or `$f::<f64>` by a dtype; other dtypes are an error naming the operation.
macro_rules! by_dtype {
    ($dtype:expr, $name:expr, $f:ident ( $($arg:expr),* $(,)? )) => {
        match $dtype {
            candle_core::DType::F32 => $f::<f32>($($arg),*),
            candle_core::DType::F64 => $f::<f64>($($arg),*),
            other => candle_core::bail!("{} on the CPU takes f32 or f64, not {other:?}", $name),
        }
    };
}
pub(super) use by_dtype;

/// Whether the CPU kernels take this tensor; others go through candle's tensor operations.
pub(super) fn has_kernel(tensor: &Tensor) -> bool {
    tensor.device().is_cpu()
        && matches!(
            tensor.dtype(),
            candle_core::DType::F32 | candle_core::DType::F64
        )
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
