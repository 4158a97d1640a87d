//! The transforms of kernels, and of their gradients back.

use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::super::Geometry;
use super::VALUES;
use crate::ops::cpu::real::{Real, real};

/// `G·k·Gᵀ` of every kernel: `[O, 16, C]`.
pub(super) fn transform_kernels<T: Real>(weight: &[T], g: &Geometry) -> Vec<T> {
    let mut out = vec![T::zero(); VALUES * g.o * g.c];
    out.par_chunks_exact_mut(VALUES * g.c)
        .zip(weight.par_chunks_exact(9 * g.c))
        .for_each(|(out, kernels)| kernels_forth(kernels, out));
    out
}

/// Kernels that are transformed together.
const KERNELS: usize = 16;

/// The transform of one output channel's kernels: `[C, 9]` → `[16, C]`.
#[pulp::with_simd(kernels_forth = Arch::new())]
#[inline(always)]
fn kernels_forth_on<S: Simd, T: Real>(_: S, kernels: &[T], out: &mut [T]) {
    let channels = out.len() / VALUES;
    let half: T = real(0.5);
    for (index, kernels) in kernels.chunks(9 * KERNELS).enumerate() {
        let count = kernels.len() / 9;
        let mut k = [[T::zero(); KERNELS]; 9];
        for (lane, kernel) in kernels.chunks_exact(9).enumerate() {
            for (k, &v) in k.iter_mut().zip(kernel) {
                k[lane] = v;
            }
        }
        // Columns first: three rows of four.
        let mut rows = [[[T::zero(); KERNELS]; 4]; 3];
        for (row, k) in rows.iter_mut().zip(k.chunks_exact(3)) {
            for l in 0..KERNELS {
                let (sum, middle) = (k[0][l] + k[2][l], k[1][l]);
                row[0][l] = k[0][l];
                row[1][l] = half * (sum + middle);
                row[2][l] = half * (sum - middle);
                row[3][l] = k[2][l];
            }
        }
        for column in 0..4 {
            let mut values = [[T::zero(); KERNELS]; 4];
            for l in 0..KERNELS {
                let (a, b, c) = (rows[0][column][l], rows[1][column][l], rows[2][column][l]);
                values[0][l] = a;
                values[1][l] = half * (a + c + b);
                values[2][l] = half * (a + c - b);
                values[3][l] = c;
            }
            for (row, values) in values.iter().enumerate() {
                let at = (4 * row + column) * channels + index * KERNELS;
                out[at..at + count].copy_from_slice(&values[..count]);
            }
        }
    }
}

/// `Gᵀ·s·G` of every kernel's summed products `[16, O, C]`: `[O, C, 9]`.
pub(super) fn gradients<T: Real>(sums: &[T], g: &Geometry) -> Vec<T> {
    let mut out = vec![T::zero(); 9 * g.o * g.c];
    out.par_chunks_exact_mut(9 * g.c)
        .enumerate()
        .for_each(|(o, out)| kernels_back(&sums[o * g.c..], g.o * g.c, out));
    out
}

/// `Gᵀ·s·G`, the transform of summed products to the gradients of one output channel's kernels: rows of `[16, …]` that are
/// `stride` apart → `[C, 9]`.
#[pulp::with_simd(kernels_back = Arch::new())]
#[inline(always)]
fn kernels_back_on<S: Simd, T: Real>(_: S, sums: &[T], stride: usize, out: &mut [T]) {
    let half: T = real(0.5);
    for (index, out) in out.chunks_mut(9 * KERNELS).enumerate() {
        let count = out.len() / 9;
        let mut s = [[T::zero(); KERNELS]; VALUES];
        for (value, s) in s.iter_mut().enumerate() {
            let at = value * stride + index * KERNELS;
            s[..count].copy_from_slice(&sums[at..at + count]);
        }
        // Rows first: three rows of four.
        let mut rows = [[[T::zero(); KERNELS]; 4]; 3];
        for column in 0..4 {
            for l in 0..KERNELS {
                let (b, c) = (half * s[4 + column][l], half * s[8 + column][l]);
                rows[0][column][l] = s[column][l] + b + c;
                rows[1][column][l] = b - c;
                rows[2][column][l] = b + c + s[12 + column][l];
            }
        }
        let mut k = [[T::zero(); KERNELS]; 9];
        for (k, row) in k.chunks_exact_mut(3).zip(&rows) {
            for l in 0..KERNELS {
                let (b, c) = (half * row[1][l], half * row[2][l]);
                k[0][l] = row[0][l] + b + c;
                k[1][l] = b - c;
                k[2][l] = b + c + row[3][l];
            }
        }
        for (lane, kernel) in out.chunks_exact_mut(9).enumerate() {
            for (v, k) in kernel.iter_mut().zip(&k) {
                *v = k[lane];
            }
        }
    }
}
