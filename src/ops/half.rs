//! Slices of 16-bit floats to `f32` and back, by all cores.

use candle_core::{CpuStorage, DType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd};
use rayon::prelude::*;

/// Elements that one task converts.
const CHUNK: usize = 1 << 14;

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

// Written out: the slice conversions of the crate `half` go number by number for this type.
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

/// `f32` numbers rounded to `dtype`, if that has 16 bits; else a copy of them.
pub(super) fn narrow(wide: &[f32], dtype: DType) -> CpuStorage {
    match dtype {
        DType::F16 => CpuStorage::F16(rounded(wide)),
        DType::BF16 => CpuStorage::BF16(rounded(wide)),
        _ => CpuStorage::F32(wide.to_vec()),
    }
}

fn rounded<H: Half>(wide: &[f32]) -> Vec<H> {
    let mut half = vec![H::default(); wide.len()];
    half.par_chunks_mut(CHUNK)
        .zip(wide.par_chunks(CHUNK))
        .for_each(|(half, wide)| H::round(wide, half));
    half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rounds_to_bf16_as_the_crate_half_does() {
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
}
