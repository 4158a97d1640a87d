//! Changes of type, by all cores on the CPU.

use candle_core::{
    CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, backend::BackendStorage,
};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::backward::deliver;
use super::kernel::slice;

/// Elements a task converts.
const CHUNK: usize = 1 << 14;

/// `x` as `dtype`, differentiable.
///
/// # Errors
/// When the tensor can't be read.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let ours = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if x.dtype() == dtype {
        Ok(x.clone())
    } else if x.device().is_cpu() && ours(x.dtype()) && ours(dtype) {
        x.contiguous()?.apply_op1(Cast(dtype))
    } else {
        x.to_dtype(dtype)
    }
}

struct Cast(DType);

impl CustomOp1 for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let wide = match x.dtype() {
            DType::F16 => widen(slice::<f16>(x, layout)?),
            DType::BF16 => widen(slice::<bf16>(x, layout)?),
            _ => {
                return Ok((
                    narrow(slice::<f32>(x, layout)?, self.0),
                    layout.shape().clone(),
                ));
            }
        };
        let values = match self.0 {
            DType::F32 => CpuStorage::F32(wide),
            half => narrow(&wide, half),
        };
        Ok((values, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        deliver(x, Some(cast(grad, x.dtype())?))
    }
}

/// A 16-bit type and its conversions.
pub(super) trait Half: Send + Sync + Clone + Default {
    fn widen(half: &[Self], wide: &mut [f32]);
    fn round(wide: &[f32], half: &mut [Self]);
}

impl Half for f16 {
    fn widen(half: &[Self], wide: &mut [f32]) {
        half.convert_to_f32_slice(wide);
    }

    fn round(wide: &[f32], half: &mut [Self]) {
        half.convert_from_f32_slice(wide);
    }
}

// Written out: the slice conversions of `half` go number by number for this type.
impl Half for bf16 {
    fn widen(half: &[Self], wide: &mut [f32]) {
        widen_bf16(half, wide);
    }

    fn round(wide: &[f32], half: &mut [Self]) {
        round_bf16(wide, half);
    }
}

#[pulp::with_simd(widen_bf16 = Arch::new())]
#[inline(always)]
fn widen_bf16_on<S: Simd>(_: S, half: &[bf16], wide: &mut [f32]) {
    for (wide, half) in wide.iter_mut().zip(half) {
        *wide = f32::from_bits(u32::from(half.to_bits()) << 16);
    }
}

#[pulp::with_simd(round_bf16 = Arch::new())]
#[inline(always)]
fn round_bf16_on<S: Simd>(_: S, wide: &[f32], half: &mut [bf16]) {
    for (half, wide) in half.iter_mut().zip(wide) {
        let bits = wide.to_bits();
        // To the nearest, of two equally near ones the even; a NaN must stay one.
        let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40;
        let rounded = if wide.is_nan() { nan } else { nearest };
        *half = bf16::from_bits(rounded as u16);
    }
}

/// 16-bit numbers as `f32`.
pub(super) fn widen<H: Half>(half: &[H]) -> Vec<f32> {
    let mut wide = vec![0f32; half.len()];
    wide.par_chunks_mut(CHUNK)
        .zip(half.par_chunks(CHUNK))
        .for_each(|(wide, half)| H::widen(half, wide));
    wide
}

/// `f32` numbers as `dtype`: themselves, or rounded to 16 bits.
pub(super) fn narrow(wide: &[f32], dtype: DType) -> CpuStorage {
    fn rounded<H: Half>(wide: &[f32]) -> Vec<H> {
        let mut half = vec![H::default(); wide.len()];
        half.par_chunks_mut(CHUNK)
            .zip(wide.par_chunks(CHUNK))
            .for_each(|(half, wide)| H::round(wide, half));
        half
    }
    match dtype {
        DType::F16 => CpuStorage::F16(rounded(wide)),
        DType::BF16 => CpuStorage::BF16(rounded(wide)),
        _ => CpuStorage::F32(wide.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::backward;

    #[test]
    fn casts_equal_candles() -> Result<()> {
        let x = Tensor::randn(0f32, 1.0, (3, CHUNK), &Device::Cpu)?;
        for dtype in [DType::F16, DType::BF16] {
            let half = cast(&x, dtype)?;
            assert_eq!(half.dtype(), dtype);
            let want = x.to_dtype(dtype)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            assert_eq!(cast(&half, DType::F32)?.to_vec2::<f32>()?, want);
        }
        Ok(())
    }

    #[test]
    fn rounding_to_bf16_equals_that_of_half_for_all_kinds_of_numbers() {
        let special = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN_POSITIVE,
        ];
        let ties = (0..1 << 17).map(|i| f32::from_bits(0x3f80_0000 + (i << 14)));
        let wide: Vec<f32> = special.into_iter().chain(ties).collect();
        let CpuStorage::BF16(half) = narrow(&wide, DType::BF16) else {
            panic!("not bf16");
        };
        for (x, half) in wide.iter().zip(half) {
            assert_eq!(half.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
        }
        let CpuStorage::BF16(nan) = narrow(&[f32::NAN], DType::BF16) else {
            panic!("not bf16");
        };
        assert!(nan[0].is_nan());
    }

    #[test]
    fn a_gradient_comes_back_in_the_type_of_the_operand() -> Result<()> {
        let x = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu)?;
        let half = cast(&x, DType::F16)?;
        let gradients = backward(&cast(&half.sqr()?, DType::F32)?.sum_all()?)?;
        let gradient = gradients.get(&x).expect("a gradient");
        assert_eq!(gradient.to_vec1::<f32>()?, [2.0, 4.0, 6.0]);
        Ok(())
    }
}
