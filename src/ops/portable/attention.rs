//! [`ops::attention`](crate::ops::attention()) of candle's tensor operations.

use candle_core::{Result, Tensor};

use super::wide;
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

/// Attention weights that are held at once.
const WEIGHTS: usize = 1 << 25;

/// As [`crate::ops::attention()`], which checks the shapes, in blocks of queries whose weights the backward computes anew.
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let (b, m, _) = k.dims3()?;
    let rows = (WEIGHTS / (b * heads * m).max(1)).max(1);
    let op = AttentionOp {
        heads,
        causal,
        rows,
    };
    apply(op, [q, k, v])
}

/// As [`crate::ops::attention()`] with all weights at once, differentiated by candle.
pub(in crate::ops) fn plain_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let q = split(q, heads)?.affine(scale(q, heads)?, 0.0)?;
    let (k, v) = (split(k, heads)?, split(v, heads)?);
    let weights = weights(&q, &k, causal.then_some(0))?.to_dtype(v.dtype())?;
    merge(&weights.matmul(&v)?)
}

/// `1 / √d`, the factor of the scores.
fn scale(q: &Tensor, heads: usize) -> Result<f64> {
    Ok(1.0 / ((q.dim(2)? / heads) as f64).sqrt())
}

/// `[B, n, heads·d]` → `[B, heads, n, d]`.
fn split(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    x.reshape((b, n, heads, c / heads))?
        .transpose(1, 2)?
        .contiguous()
}

/// `[B, heads, n, d]` → `[B, n, heads·d]`.
fn merge(x: &Tensor) -> Result<Tensor> {
    let (b, heads, n, d) = x.dims4()?;
    x.transpose(1, 2)?.contiguous()?.reshape((b, n, heads * d))
}

/// The attention weights `[B, heads, rows, M]`, wide, of scaled queries `[B, heads, rows, d]` and keys `[B, heads, M, d]`.
/// `causal` is the position of the first query: each query attends to the keys up to its own position.
fn weights(q: &Tensor, k: &Tensor, causal: Option<usize>) -> Result<Tensor> {
    let mut scores = wide(&q.matmul(&k.t()?)?)?;
    if let Some(first) = causal {
        let (rows, m) = (q.dim(2)?, k.dim(2)?);
        let mask: Vec<f32> = (0..rows * m)
            .map(|i| {
                if i % m > first + i / m {
                    f32::NEG_INFINITY
                } else {
                    0.0
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (rows, m), q.device())?.to_dtype(scores.dtype())?;
        scores = scores.broadcast_add(&mask)?;
    }
    // Not candle_nn's softmax over the last dimension, which drops gradients without an error.
    let exp = scores
        .broadcast_sub(&scores.max_keepdim(3)?.detach())?
        .exp()?;
    exp.broadcast_div(&exp.sum_keepdim(3)?)
}

pub(super) struct AttentionOp {
    pub(super) heads: usize,
    pub(super) causal: bool,
    /// Queries of a block: their weights are held at once.
    pub(super) rows: usize,
}

impl AttentionOp {
    /// The first query and the length of each block of `n` queries.
    fn blocks(&self, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let rows = self.rows;
        (0..n)
            .step_by(rows)
            .map(move |from| (from, rows.min(n - from)))
    }

    /// The position of a block's first query, if attention is causal.
    fn first(&self, from: usize) -> Option<usize> {
        self.causal.then_some(from)
    }
}

/// Adds to a sum that starts with its first term.
fn accumulate(sum: &mut Option<Tensor>, term: &Tensor) -> Result<()> {
    let term = wide(term)?;
    *sum = Some(match sum.take() {
        Some(sum) => (sum + term)?,
        None => term,
    });
    Ok(())
}

impl AutogradOp<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn forward(&self, [q, k, v]: [&Tensor; 3]) -> Result<OpResult> {
        let scaled = (split(q, self.heads)? * scale(q, self.heads)?)?;
        let (k, v) = (split(k, self.heads)?, split(v, self.heads)?);
        let mut out = Vec::new();
        for (from, rows) in self.blocks(q.dim(1)?) {
            let q = scaled.narrow(2, from, rows)?.contiguous()?;
            let weights = weights(&q, &k, self.first(from))?.to_dtype(v.dtype())?;
            out.push(weights.matmul(&v)?);
        }
        Ok(merge(&Tensor::cat(&out, 2)?)?.into())
    }

    fn backward(&self, inputs: [&Tensor; 3], grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let [need_q, need_k, need_v] = inputs.map(Tensor::track_op);
        let dtype = grad.dtype();
        let (n, scale) = (inputs[0].dim(1)?, scale(inputs[0], self.heads)?);
        let grad = split(grad, self.heads)?;
        let [q, k, v] = inputs.map(|x| split(&x.detach(), self.heads));
        let (scaled, k, v) = ((q? * scale)?, k?, v?);
        let (mut gq, mut gk, mut gv) = (Vec::new(), None, None);
        for (from, rows) in self.blocks(n) {
            let q = scaled.narrow(2, from, rows)?.contiguous()?;
            let grad = grad.narrow(2, from, rows)?.contiguous()?;
            let p = weights(&q, &k, self.first(from))?;
            if need_v {
                accumulate(&mut gv, &p.to_dtype(dtype)?.t()?.matmul(&grad)?)?;
            }
            if need_q || need_k {
                let dp = wide(&grad.matmul(&v.t()?)?)?;
                let dot = (&p * &dp)?.sum_keepdim(3)?;
                let ds = (p * dp.broadcast_sub(&dot)?)?.to_dtype(dtype)?;
                if need_q {
                    gq.push((ds.matmul(&k)? * scale)?);
                }
                if need_k {
                    accumulate(&mut gk, &ds.t()?.matmul(&q)?)?;
                }
            }
        }
        let merged = |sum: Option<Tensor>| sum.map(|x| merge(&x.to_dtype(dtype)?)).transpose();
        let gq = need_q.then(|| Tensor::cat(&gq, 2)).transpose()?;
        Ok([merged(gq)?, merged(gk)?, merged(gv)?])
    }
}
