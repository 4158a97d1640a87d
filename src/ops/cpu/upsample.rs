//! [`ops::upsample_nearest_2x`](crate::ops::upsample_nearest_2x()) on the CPU.

use candle_core::{Result, Shape, Tensor};
use rayon::prelude::*;

use super::kernel::{Kernel, apply};
use super::real::Real;

/// As [`crate::ops::upsample_nearest_2x()`].
pub(in crate::ops) fn upsample_nearest_2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    apply(UpsampleKernel { b, c, h, w }, [x])
}

struct UpsampleKernel {
    b: usize,
    c: usize,
    h: usize,
    w: usize,
}

impl Kernel<1> for UpsampleKernel {
    const NAME: &'static str = "upsample_nearest_2x";

    fn shape(&self) -> Shape {
        Shape::from((self.b, self.c, 2 * self.h, 2 * self.w))
    }

    fn forward<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<T> {
        let w = self.w;
        let mut out = vec![T::zero(); 4 * x.len()];
        out.par_chunks_mut(4 * w)
            .zip(x.par_chunks(w))
            .for_each(|(out, row)| {
                let (first, second) = out.split_at_mut(2 * w);
                for (pair, &x) in first.chunks_exact_mut(2).zip(row) {
                    pair.fill(x);
                }
                second.copy_from_slice(first);
            });
        out
    }

    fn backward<T: Real>(&self, _: [&[T]; 1], grad: &[T], _: [bool; 1]) -> [Option<Vec<T>>; 1] {
        let w = self.w;
        let mut out = vec![T::zero(); grad.len() / 4];
        out.par_chunks_mut(w)
            .zip(grad.par_chunks(4 * w))
            .for_each(|(out, grad)| {
                let (first, second) = grad.split_at(2 * w);
                let pairs = first.chunks_exact(2).zip(second.chunks_exact(2));
                for (o, (a, b)) in out.iter_mut().zip(pairs) {
                    *o = a[0] + a[1] + b[0] + b[1];
                }
            });
        [Some(out)]
    }
}
