//! [`ops::geglu`](crate::ops::geglu()) and [`ops::quick_gelu`](crate::ops::quick_gelu()) on the CPU.

use candle_core::{Result, Shape, Tensor};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::kernel::{Kernel, apply};
use super::real::{Real, real, sigmoid};
use crate::ops::activation::QUICK;

/// As [`crate::ops::geglu()`], which checks the shape.
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let mut width = 0;
    if let Some(last) = dims.last_mut() {
        *last /= 2;
        width = *last;
    }
    let shape = Shape::from(dims);
    apply(GegluKernel { width, shape }, [x])
}

/// As [`crate::ops::quick_gelu()`].
pub(in crate::ops) fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    apply(QuickGeluKernel(x.shape().clone()), [x])
}

/// `Φ(x)`, the normal distribution function.
#[inline(always)]
fn normal_cdf<T: Real>(x: T) -> T {
    let half: T = real(0.5);
    half + half * (x * T::FRAC_1_SQRT_2()).fast_erf()
}

/// Values that one task computes.
const VALUES: usize = 1 << 13;

struct QuickGeluKernel(Shape);

impl Kernel<1> for QuickGeluKernel {
    const NAME: &'static str = "quick_gelu";

    fn shape(&self) -> Shape {
        self.0.clone()
    }

    fn forward<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        let mut out = vec![T::zero(); x.len()];
        out.par_chunks_mut(VALUES)
            .zip(x.par_chunks(VALUES))
            .for_each(|(out, x)| quick(out, x));
        out
    }

    fn backward<T: Real>(&self, [x]: [&[T]; 1], grad: &[T], _: [bool; 1]) -> [Option<Vec<T>>; 1] {
        let mut out = vec![T::zero(); x.len()];
        out.par_chunks_mut(VALUES)
            .zip(x.par_chunks(VALUES).zip(grad.par_chunks(VALUES)))
            .for_each(|(out, (x, grad))| quick_backward(out, x, grad));
        [Some(out)]
    }
}

#[pulp::with_simd(quick = Arch::new())]
#[inline(always)]
fn quick_on<S: Simd, T: Real>(_: S, out: &mut [T], x: &[T]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = x * sigmoid(real::<T>(QUICK) * x);
    }
}

#[pulp::with_simd(quick_backward = Arch::new())]
#[inline(always)]
fn quick_backward_on<S: Simd, T: Real>(_: S, out: &mut [T], x: &[T], grad: &[T]) {
    for ((o, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
        let scaled = real::<T>(QUICK) * x;
        let s = sigmoid(scaled);
        *o = grad * (s + scaled * s * (T::one() - s));
    }
}

/// Rows that one task computes.
const ROWS: usize = 64;

struct GegluKernel {
    width: usize,
    shape: Shape,
}

impl Kernel<1> for GegluKernel {
    const NAME: &'static str = "geglu";

    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn forward<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        let c = self.width;
        let mut out = vec![T::zero(); x.len() / 2];
        out.par_chunks_mut(ROWS * c)
            .zip(x.par_chunks(ROWS * 2 * c))
            .for_each(|(out, x)| gate_rows(out, x, c));
        out
    }

    fn backward<T: Real>(&self, [x]: [&[T]; 1], grad: &[T], _: [bool; 1]) -> [Option<Vec<T>>; 1] {
        let c = self.width;
        let mut out = vec![T::zero(); x.len()];
        out.par_chunks_mut(ROWS * 2 * c)
            .zip(x.par_chunks(ROWS * 2 * c).zip(grad.par_chunks(ROWS * c)))
            .for_each(|(out, (x, grad))| gate_rows_backward(out, x, grad, c));
        [Some(out)]
    }
}

#[pulp::with_simd(gate_rows = Arch::new())]
#[inline(always)]
fn gate_rows_on<S: Simd, T: Real>(_: S, out: &mut [T], x: &[T], c: usize) {
    for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(2 * c)) {
        let (value, gate) = x.split_at(c);
        for ((o, &v), &g) in out.iter_mut().zip(value).zip(gate) {
            *o = v * g * normal_cdf(g);
        }
    }
}

#[pulp::with_simd(gate_rows_backward = Arch::new())]
#[inline(always)]
fn gate_rows_backward_on<S: Simd, T: Real>(_: S, out: &mut [T], x: &[T], grad: &[T], c: usize) {
    let rows = out.chunks_exact_mut(2 * c).zip(x.chunks_exact(2 * c));
    for ((out, x), grad) in rows.zip(grad.chunks_exact(c)) {
        let ((dv, dg), (value, gate)) = (out.split_at_mut(c), x.split_at(c));
        gate_backward(dv, dg, value, gate, grad);
    }
}

/// The gradients of one row. A function of its own, so that the compiler knows the slices not to overlap.
#[inline(always)]
fn gate_backward<T: Real>(dv: &mut [T], dg: &mut [T], value: &[T], gate: &[T], grad: &[T]) {
    let density: T = real(1.0 / (2.0 * std::f64::consts::PI).sqrt());
    let n = dv.len();
    let (dg, value, gate, grad) = (&mut dg[..n], &value[..n], &gate[..n], &grad[..n]);
    for i in 0..n {
        let (v, g, grad) = (value[i], gate[i], grad[i]);
        let cdf = normal_cdf(g);
        let pdf = density * (g * g * real(-0.5)).fast_exp();
        dv[i] = grad * g * cdf;
        dg[i] = grad * v * (cdf + g * pdf);
    }
}
