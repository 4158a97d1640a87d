//! Multi-head scaled dot-product attention.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, portable};

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// Blocks of queries at a time; the backward computes the weights anew. Nothing of size `N·M` outlives the call. With CUDA,
    /// heads of up to 160 numbers have kernels that hold no weights in memory; wider ones, such as the VAE's of 512, are left to
    /// cuBLAS.
    MemoryEfficient,
    /// Of candle's tensor operations: the weights `[B, heads, N, M]` are kept for the backward.
    Plain,
}

/// `softmax(q·kᵀ / √d)·v` for each head, `d` being the width of a head; as `torch.nn.functional.scaled_dot_product_attention`
/// between a split into heads and their merging.
///
/// `q`: `[B, N, heads·d]`, `k` and `v`: `[B, M, heads·d]`, of one float dtype → `[B, N, heads·d]` in that dtype. With `causal`,
/// `N` is `M`, and query `i` attends to keys `0..=i` only.
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
    match kind {
        #[cfg(feature = "cuda")]
        Attention::MemoryEfficient if cuda::has_attention_kernel(q, heads) => {
            cuda::attention(q, k, v, heads, causal)
        }
        Attention::MemoryEfficient if cpu::has_kernel(q) => cpu::attention(q, k, v, heads, causal),
        Attention::MemoryEfficient => portable::attention(q, k, v, heads, causal),
        Attention::Plain => portable::plain_attention(q, k, v, heads, causal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, check_gradients, random};
    use crate::ops::gradients;

    #[test]
    fn attention_in_blocks_equals_plain() -> Result<()> {
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
    fn attention_gradients_match_finite_differences() -> Result<()> {
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
    fn attention_gradients_across_blocks_equal_plain() -> Result<()> {
        let [q, k, v] = [300, 5, 5].map(|n| {
            candle_core::Var::from_tensor(&random(&[1, n, 4], n as u64).unwrap()).unwrap()
        });
        let grads = |kind| -> Result<Vec<Tensor>> {
            let direction = random(&[1, 300, 4], 9)?;
            let sum = || {
                attention(&q, &k, &v, 2, false, kind)?
                    .mul(&direction)?
                    .sum_all()
            };
            let (grads, ()) = gradients(|| Ok((sum()?, ())))?;
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
