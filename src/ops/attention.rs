//! Multi-head scaled dot-product attention.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, backend::BackendStorage};
use rayon::prelude::*;

use super::cpu::{Grads3, Real, View, by_dtype, has_kernel, real, slice, vectorised};
use super::gemm::{Mat, MatMut, Threads, gemm};

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Blocks of queries at a time; the backward computes the weights anew. Nothing of size `N·M` outlives the call.
    MemoryEfficient,
    /// Out of candle's tensor operations: the weights `[B, heads, N, M]` are kept for the backward.
    Plain,
}

/// `softmax(q·kᵀ / √d)·v` for each head, `d` being the width of a head.
///
/// `q`: `[B, N, heads·d]`, `k` and `v`: `[B, M, heads·d]` → `[B, N, heads·d]`. With `causal`, a query sees the keys up to its own
/// place only (then `N = M`).
///
/// # Errors
/// When the shapes do not fit together.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
    kind: Attention,
) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let (kb, m, kc) = k.dims3()?;
    if heads == 0
        || !c.is_multiple_of(heads)
        || kb != b
        || kc != c
        || v.dims() != k.dims()
        || (causal && n != m)
    {
        candle_core::bail!(
            "attention: q {:?}, k {:?}, v {:?}, {heads} heads",
            q.dims(),
            k.dims(),
            v.dims()
        );
    }
    if kind == Attention::MemoryEfficient && has_kernel(q) {
        let op = Blockwise { heads, causal };
        return q
            .contiguous()?
            .apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    match kind {
        Attention::MemoryEfficient => super::tensor::attention(q, k, v, heads, causal),
        Attention::Plain => super::tensor::plain_attention(q, k, v, heads, causal),
    }
}

/// Queries whose weights are held at once.
const QUERY_BLOCK: usize = 256;

struct Blockwise {
    heads: usize,
    causal: bool,
}

/// One (image, head) pair's operands as strided matrices.
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

    /// The attention weights `[rows, M]` of queries `from..from + rows`.
    fn weights(&self, from: usize, rows: usize, out: &mut [T]) {
        let dst = MatMut::new(out, rows, self.m, self.m);
        gemm(
            dst,
            false,
            self.scale(),
            self.queries(from, rows),
            self.keys().t(),
            Threads::One,
        );
        vectorised(|| {
            for (i, row) in out.chunks_exact_mut(self.m).enumerate() {
                let seen = if self.causal { from + i + 1 } else { self.m };
                let (row, unseen) = row.split_at_mut(seen);
                unseen.fill(T::zero());
                let max = row
                    .iter()
                    .fold(T::neg_infinity(), |a, &b| if b > a { b } else { a });
                let mut sum = T::zero();
                for x in row.iter_mut() {
                    *x = (*x - max).fast_exp();
                }
                for &x in row.iter() {
                    sum += x;
                }
                let scale = T::one() / sum;
                for x in row.iter_mut() {
                    *x *= scale;
                }
            }
        });
    }

    fn forward(&self, out: &mut [T]) {
        T::with_scratch(QUERY_BLOCK.min(self.n) * self.m, |weights| {
            for from in (0..self.n).step_by(QUERY_BLOCK) {
                let rows = QUERY_BLOCK.min(self.n - from);
                let weights = &mut weights[..rows * self.m];
                self.weights(from, rows, weights);
                let dst = MatMut::new(&mut out[from * self.d..], rows, self.d, self.d);
                let weights = Mat::new(&*weights, rows, self.m, self.m);
                gemm(dst, false, T::one(), weights, self.values(), Threads::One);
            }
        });
    }

    /// Gradients of this head's q `[N, d]`, k and v `[M, d]`, given the output's gradient (strided as q).
    fn backward(&self, grad: &[T], [gq, gk, gv]: [&mut [T]; 3]) {
        let (m, d) = (self.m, self.d);
        let block = QUERY_BLOCK.min(self.n) * m;
        T::with_scratch(2 * block, |buffer| {
            let (weights, scores) = buffer.split_at_mut(block);
            for from in (0..self.n).step_by(QUERY_BLOCK) {
                let rows = QUERY_BLOCK.min(self.n - from);
                let more = from > 0;
                let (weights, scores) = (&mut weights[..rows * m], &mut scores[..rows * m]);
                self.weights(from, rows, weights);
                let grad = Mat::new(&grad[from * self.c..], rows, d, self.c);
                let p = Mat::new(&*weights, rows, m, m);
                gemm(
                    MatMut::new(gv, m, d, d),
                    more,
                    T::one(),
                    p.t(),
                    grad,
                    Threads::One,
                );
                let dp = MatMut::new(scores, rows, m, m);
                gemm(dp, false, T::one(), grad, self.values().t(), Threads::One);
                vectorised(|| {
                    for (ds, p) in scores.chunks_exact_mut(m).zip(weights.chunks_exact(m)) {
                        let mut dot = T::zero();
                        for (&ds, &p) in ds.iter().zip(p) {
                            dot += ds * p;
                        }
                        for (ds, &p) in ds.iter_mut().zip(p) {
                            *ds = p * (*ds - dot);
                        }
                    }
                });
                let ds = Mat::new(&*scores, rows, m, m);
                let dst = MatMut::new(&mut gq[from * d..], rows, d, d);
                gemm(dst, false, self.scale(), ds, self.keys(), Threads::One);
                let dst = MatMut::new(gk, m, d, d);
                gemm(
                    dst,
                    more,
                    self.scale(),
                    ds.t(),
                    self.queries(from, rows),
                    Threads::One,
                );
            }
        });
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

impl Blockwise {
    /// The operands of the `index`th (image, head) pair.
    fn head<'a, T>(
        &self,
        [q, k, v]: [&'a [T]; 3],
        index: usize,
        n: usize,
        m: usize,
        c: usize,
    ) -> Head<'a, T> {
        let d = c / self.heads;
        let (b, offset) = (index / self.heads, index % self.heads * d);
        Head {
            q: &q[b * n * c + offset..],
            k: &k[b * m * c + offset..],
            v: &v[b * m * c + offset..],
            n,
            m,
            c,
            d,
            causal: self.causal,
        }
    }

    fn backward<T: Real>(&self, [q, k, v]: [&Tensor; 3], grad: &Tensor) -> Result<Grads3> {
        let (_, n, c) = q.dims3()?;
        let m = k.dim(1)?;
        let d = c / self.heads;
        let views = [q, k, v].map(View::of);
        let operands = [
            views[0].slice::<T>()?,
            views[1].slice::<T>()?,
            views[2].slice::<T>()?,
        ];
        let grad_view = View::of(grad);
        let grads = grad_view.slice::<T>()?;
        let [mut gq, mut gk, mut gv] = operands.map(|s| vec![T::zero(); s.len()]);
        gq.par_chunks_exact_mut(n * d)
            .zip(
                gk.par_chunks_exact_mut(m * d)
                    .zip(gv.par_chunks_exact_mut(m * d)),
            )
            .enumerate()
            .for_each(|(index, (gq, (gk, gv)))| {
                let grad = &grads[index / self.heads * n * c + index % self.heads * d..];
                self.head(operands, index, n, m, c)
                    .backward(grad, [gq, gk, gv]);
            });
        let merged = |x: &[T], like: &Tensor, n: usize| {
            Tensor::from_vec(
                merge_heads(x, self.heads, n, d),
                like.shape(),
                like.device(),
            )
            .map(Some)
        };
        Ok((merged(&gq, q, n)?, merged(&gk, k, m)?, merged(&gv, v, m)?))
    }
}

impl CustomOp3 for Blockwise {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        fn run<T: Real>(op: &Blockwise, s: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
            let (_, n, c) = s[0].1.shape().dims3()?;
            let m = s[1].1.shape().dims3()?.1;
            let operands = [
                slice::<T>(s[0].0, s[0].1)?,
                slice(s[1].0, s[1].1)?,
                slice(s[2].0, s[2].1)?,
            ];
            let d = c / op.heads;
            let mut out = vec![T::zero(); operands[0].len()];
            out.par_chunks_exact_mut(n * d)
                .enumerate()
                .for_each(|(index, out)| op.head(operands, index, n, m, c).forward(out));
            Ok(T::to_cpu_storage_owned(merge_heads(&out, op.heads, n, d)))
        }
        let operands = [(q, ql), (k, kl), (v, vl)];
        let out = by_dtype!(q.dtype(), self.name(), run(self, operands))?;
        Ok((out, ql.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<Grads3> {
        fn run<T: Real>(op: &Blockwise, args: [&Tensor; 3], grad: &Tensor) -> Result<Grads3> {
            op.backward::<T>(args, grad)
        }
        by_dtype!(
            q.dtype(),
            self.name(),
            run(self, [q, k, v], &grad.contiguous()?)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradcheck::{assert_close, check_gradients, random};
    use super::*;

    #[test]
    fn blockwise_equals_plain() -> Result<()> {
        // More queries than one block holds.
        for (n, m, causal) in [(300, 7, false), (5, 9, false), (270, 270, true)] {
            let (q, k, v) = (
                random(&[2, n, 6], 1)?,
                random(&[2, m, 6], 2)?,
                random(&[2, m, 6], 3)?,
            );
            let plain = attention(&q, &k, &v, 2, causal, Attention::Plain)?;
            let blocks = attention(&q, &k, &v, 2, causal, Attention::MemoryEfficient)?;
            assert_close(&blocks, &plain, 1e-12)?;
        }
        Ok(())
    }

    #[test]
    fn gradients_match_finite_differences() -> Result<()> {
        for kind in [Attention::MemoryEfficient, Attention::Plain] {
            for (n, m, causal) in [(4, 3, false), (3, 3, true)] {
                let inputs = [
                    random(&[2, n, 4], 1)?,
                    random(&[2, m, 4], 2)?,
                    random(&[2, m, 4], 3)?,
                ];
                check_gradients(&inputs, |t| attention(&t[0], &t[1], &t[2], 2, causal, kind))?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_across_query_blocks_equal_plain() -> Result<()> {
        let [q, k, v] = [300, 5, 5].map(|n| {
            candle_core::Var::from_tensor(&random(&[1, n, 4], n as u64).unwrap()).unwrap()
        });
        let grads = |kind| -> Result<Vec<Tensor>> {
            let out = attention(&q, &k, &v, 2, false, kind)?;
            let grads = out.mul(&random(&[1, 300, 4], 9)?)?.sum_all()?.backward()?;
            Ok([&q, &k, &v].map(|x| grads.get(x).unwrap().clone()).to_vec())
        };
        for (a, b) in grads(Attention::MemoryEfficient)?
            .iter()
            .zip(grads(Attention::Plain)?)
        {
            assert_close(a, &b, 1e-11)?;
        }
        Ok(())
    }
}
