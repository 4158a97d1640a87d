//! [`ops::attention`](crate::ops::attention()) on the CPU, in blocks of queries: one task for each (image, head) pair.

use candle_core::{Result, Shape, Tensor};
use pulp::{Arch, Simd};
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Threads, gemm};
use super::kernel::{Kernel, apply};
use super::real::{Real, real};
use super::reduce::{dot, map_and_sum, max};

/// As [`crate::ops::attention()`], which checks the shapes; the backward computes the weights anew.
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let kernel = AttentionKernel {
        b,
        n,
        m: k.dim(1)?,
        c,
        heads,
        causal,
    };
    apply(kernel, [q, k, v])
}

/// Queries of a block: their weights are held at once.
const QUERY_BLOCK: usize = 256;

struct AttentionKernel {
    b: usize,
    n: usize,
    m: usize,
    c: usize,
    heads: usize,
    causal: bool,
}

/// The operands of one (image, head) pair, as strided matrices.
struct Head<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    n: usize,
    m: usize,
    c: usize,
    d: usize,
    causal: bool,
}

impl<'a, T: Real> Head<'a, T> {
    fn queries(&self, from: usize, rows: usize) -> Mat<'a, T> {
        Mat::new(&self.q[from * self.c..], rows, self.d, self.c)
    }

    fn keys(&self) -> Mat<'a, T> {
        Mat::new(self.k, self.m, self.d, self.c)
    }

    fn values(&self) -> Mat<'a, T> {
        Mat::new(self.v, self.m, self.d, self.c)
    }

    fn scale(&self) -> T {
        real(1.0 / (self.d as f64).sqrt())
    }

    /// Writes the unnormalised attention weights `[rows, M]` of queries `from..from + rows`, and the factor `[rows]` that makes
    /// each row sum to one.
    fn weights(&self, from: usize, rows: usize, out: &mut [T], factors: &mut [T]) {
        let dst = MatMut::new(out, rows, self.m, self.m);
        gemm(
            dst,
            false,
            self.scale(),
            self.queries(from, rows),
            self.keys().t(),
            Threads::One,
        );
        exponentials(out, factors, self.causal.then_some(from));
    }

    /// Writes this head's result `[N, d]`.
    fn forward(&self, out: &mut [T]) {
        let rows = QUERY_BLOCK.min(self.n);
        T::with_scratch(rows * (self.m + 1), |buffer| {
            let (weights, factors) = buffer.split_at_mut(rows * self.m);
            for (index, out) in out.chunks_mut(QUERY_BLOCK * self.d).enumerate() {
                let (from, rows) = (index * QUERY_BLOCK, out.len() / self.d);
                let (weights, factors) = (&mut weights[..rows * self.m], &mut factors[..rows]);
                self.weights(from, rows, weights, factors);
                let weights = Mat::new(&*weights, rows, self.m, self.m);
                let dst = MatMut::new(out, rows, self.d, self.d);
                gemm(dst, false, T::one(), weights, self.values(), Threads::One);
                scale_rows(out, self.d, factors);
            }
        });
    }

    /// Writes the gradients of this head's q `[N, d]`, k and v `[M, d]`, given the result's, strided as `q`.
    fn backward(&self, grad: &[T], [gq, gk, gv]: [&mut [T]; 3]) {
        let (m, d) = (self.m, self.d);
        let rows = QUERY_BLOCK.min(self.n);
        T::with_scratch(rows * (2 * m + d + 1), |buffer| {
            let (weights, buffer) = buffer.split_at_mut(rows * m);
            let (scores, buffer) = buffer.split_at_mut(rows * m);
            let (scaled, factors) = buffer.split_at_mut(rows * d);
            for (index, gq) in gq.chunks_mut(QUERY_BLOCK * d).enumerate() {
                let (from, rows) = (index * QUERY_BLOCK, gq.len() / d);
                let (weights, scores) = (&mut weights[..rows * m], &mut scores[..rows * m]);
                let (scaled, factors) = (&mut scaled[..rows * d], &mut factors[..rows]);
                self.weights(from, rows, weights, factors);
                let grad = &grad[from * self.c..];
                for (scaled, grad) in scaled.chunks_exact_mut(d).zip(grad.chunks(self.c)) {
                    scaled.copy_from_slice(&grad[..d]);
                }
                scale_rows(scaled, d, factors);
                let grad = Mat::new(grad, rows, d, self.c);
                let dp = MatMut::new(scores, rows, m, m);
                gemm(dp, false, T::one(), grad, self.values().t(), Threads::One);
                gemm(
                    MatMut::new(gv, m, d, d),
                    from > 0,
                    T::one(),
                    Mat::new(&*weights, rows, m, m).t(),
                    Mat::new(&*scaled, rows, d, d),
                    Threads::One,
                );
                softmax_backward(scores, weights, factors);
                let ds = Mat::new(&*scores, rows, m, m);
                let dst = MatMut::new(gq, rows, d, d);
                gemm(dst, false, self.scale(), ds, self.keys(), Threads::One);
                gemm(
                    MatMut::new(gk, m, d, d),
                    from > 0,
                    self.scale(),
                    ds.t(),
                    self.queries(from, rows),
                    Threads::One,
                );
            }
        });
    }
}

/// Turns rows of scores into unnormalised softmax weights and writes the factor that makes each row sum to one. With a
/// causal mask, `causal` is the query of the first row.
#[pulp::with_simd(exponentials = Arch::new())]
#[inline(always)]
fn exponentials_on<S: Simd, T: Real>(
    _: S,
    scores: &mut [T],
    factors: &mut [T],
    causal: Option<usize>,
) {
    let m = scores.len() / factors.len();
    let rows = scores.chunks_exact_mut(m).zip(factors).enumerate();
    for (i, (row, factor)) in rows {
        let seen = causal.map_or(m, |from| from + i + 1);
        let (row, unseen) = row.split_at_mut(seen);
        unseen.fill(T::zero());
        let max = max(row);
        *factor = T::one() / map_and_sum(row, |x| (x - max).fast_exp());
    }
}

/// Turns the gradient of normalised weights into that of the scores: `p·(dp - Σ dp·p)` where `p = weights·factor`.
#[pulp::with_simd(softmax_backward = Arch::new())]
#[inline(always)]
fn softmax_backward_on<S: Simd, T: Real>(_: S, grad: &mut [T], weights: &[T], factors: &[T]) {
    let m = weights.len() / factors.len();
    let rows = grad.chunks_exact_mut(m).zip(weights.chunks_exact(m));
    for ((grad, weights), &factor) in rows.zip(factors) {
        let along = factor * dot(grad, weights);
        for (g, &w) in grad.iter_mut().zip(weights) {
            *g = w * factor * (*g - along);
        }
    }
}

/// Multiplies each row of `[rows, width]` by its factor.
#[pulp::with_simd(scale_rows = Arch::new())]
#[inline(always)]
fn scale_rows_on<S: Simd, T: Real>(_: S, x: &mut [T], width: usize, factors: &[T]) {
    for (row, &factor) in x.chunks_exact_mut(width).zip(factors) {
        for x in row {
            *x *= factor;
        }
    }
}

/// `[B, heads, n, d]` → `[B, n, heads·d]`.
fn merge_heads<T: Real>(x: &[T], heads: usize, n: usize, d: usize) -> Vec<T> {
    let c = heads * d;
    let mut out = vec![T::zero(); x.len()];
    out.par_chunks_exact_mut(n * c)
        .zip(x.par_chunks_exact(n * c))
        .for_each(|(out, x)| {
            for (h, x) in x.chunks_exact(n * d).enumerate() {
                for (i, x) in x.chunks_exact(d).enumerate() {
                    out[i * c + h * d..][..d].copy_from_slice(x);
                }
            }
        });
    out
}

impl AttentionKernel {
    /// Width of a head.
    fn d(&self) -> usize {
        self.c / self.heads
    }

    /// The operands of the `index`th (image, head) pair.
    fn head<'a, T>(&self, [q, k, v]: [&'a [T]; 3], index: usize) -> Head<'a, T> {
        let Self { n, m, c, .. } = *self;
        let (b, offset) = (index / self.heads, index % self.heads * self.d());
        Head {
            q: &q[b * n * c + offset..],
            k: &k[b * m * c + offset..],
            v: &v[b * m * c + offset..],
            n,
            m,
            c,
            d: self.d(),
            causal: self.causal,
        }
    }
}

impl Kernel<3> for AttentionKernel {
    const NAME: &'static str = "attention";

    fn shape(&self) -> Shape {
        Shape::from((self.b, self.n, self.c))
    }

    fn forward<T: Real>(&self, operands: [&[T]; 3]) -> Vec<T> {
        let mut out = vec![T::zero(); operands[0].len()];
        out.par_chunks_exact_mut(self.n * self.d())
            .enumerate()
            .for_each(|(index, out)| self.head(operands, index).forward(out));
        merge_heads(&out, self.heads, self.n, self.d())
    }

    fn backward<T: Real>(
        &self,
        operands: [&[T]; 3],
        grad: &[T],
        _: [bool; 3],
    ) -> [Option<Vec<T>>; 3] {
        let (n, m, d) = (self.n, self.m, self.d());
        let [mut gq, mut gk, mut gv] = operands.map(|s| vec![T::zero(); s.len()]);
        gq.par_chunks_exact_mut(n * d)
            .zip(gk.par_chunks_exact_mut(m * d))
            .zip(gv.par_chunks_exact_mut(m * d))
            .enumerate()
            .for_each(|(index, ((gq, gk), gv))| {
                let grad = &grad[index / self.heads * n * self.c + index % self.heads * d..];
                self.head(operands, index).backward(grad, [gq, gk, gv]);
            });
        [(gq, n), (gk, m), (gv, m)].map(|(x, rows)| Some(merge_heads(&x, self.heads, rows, d)))
    }
}
