//! [`ops::attention`](crate::ops::attention()) by kernels that hold no weights in memory, for heads of up to [`WIDEST`] numbers.

use candle_core::{DType, Result, Tensor, bail};

use super::gpu::{Arg, Launch, Module, Output, THREADS, empty, empty_like, launch, module};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply, is_recorded};

/// Numbers of the widest head that the kernels take.
pub(in crate::ops) const WIDEST: usize = 160;

/// Whether the kernels take queries of so many heads.
#[cfg(feature = "cuda")]
pub(in crate::ops) fn has_attention_kernel(q: &Tensor, heads: usize) -> bool {
    super::has_kernel(q) && q.dims().last().is_some_and(|c| c / heads <= WIDEST)
}

/// As [`crate::ops::attention()`], which checks the shapes.
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    causal: bool,
) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let m = k.dim(1)?;
    if q.elem_count() == 0 || m == 0 {
        bail!("attention of {n} queries to {m} keys, with {heads} heads of {b} images");
    }
    if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        bail!(
            "attention: q is {:?}, k {:?}, v {:?}",
            q.dtype(),
            k.dtype(),
            v.dtype()
        );
    }
    let operands = [&q.contiguous()?, &k.contiguous()?, &v.contiguous()?];
    let lse = is_recorded(&operands).then(|| empty((b, heads, n), DType::F32, q.device()));
    let op = AttentionOp {
        b,
        n,
        m,
        heads,
        d: c / heads,
        causal,
        lse: lse.transpose()?,
    };
    apply(op, operands)
}

/// The part of attention that a kernel computes; each has its own sizes of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Forward,
    BackwardQ,
    BackwardKv,
}

/// The sizes of a kernel. They are in its name too, so that a kernel of other sizes is not found.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    /// Numbers of the widest head.
    width: usize,
    /// Rows of a block: queries, or keys where their gradients are computed.
    rows: usize,
    /// Columns that a block goes through at a time.
    columns: usize,
    warps: usize,
}

impl Tiles {
    /// The kernel for heads of `d` numbers, which there is for up to [`WIDEST`].
    fn new(part: Part, dtype: DType, d: usize) -> Result<Self> {
        let Some(width) = [40, 64, 80, WIDEST].into_iter().find(|&width| d <= width) else {
            bail!("attention has kernels for heads of up to {WIDEST} numbers, not {d}");
        };
        let (rows, columns, warps) = match (part, width, dtype) {
            (Part::Forward, WIDEST, DType::F32) => (64, 16, 4),
            (_, WIDEST, DType::F32) => (32, 16, 2),
            (_, _, DType::F32) => (64, 32, 4),
            (Part::Forward, 40 | 64, _) => (128, 64, 4),
            (Part::Forward, 80, _) => (128, 32, 4),
            (Part::BackwardQ, 40 | 64, _) => (128, 32, 4),
            (Part::BackwardKv, 40, _) => (128, 32, 4),
            (Part::BackwardKv, 64, _) => (64, 64, 4),
            _ => (64, 32, 4),
        };
        Ok(Self {
            width,
            rows,
            columns,
            warps,
        })
    }

    /// Shared memory of a block, in bytes: tiles of the rows, two tiles at a time of the columns' two operands, and with the
    /// gradients of keys two numbers of each column.
    fn shared(&self, part: Part, dtype: DType) -> usize {
        let row = (self.width.next_multiple_of(16) + 8) * dtype.size_in_bytes();
        let (tiles_of_rows, numbers) = match part {
            Part::Forward => (1, 0),
            Part::BackwardQ => (2, 0),
            Part::BackwardKv => (2, 2),
        };
        let of_columns = 4 * row + 2 * numbers * size_of::<f32>();
        tiles_of_rows * self.rows * row + self.columns * of_columns
    }
}

/// The kernels of a dtype.
fn module(dtype: DType) -> Module {
    match dtype {
        DType::F16 => module!("attention_f16"),
        DType::BF16 => module!("attention_bf16"),
        _ => module!("attention_f32"),
    }
}

struct AttentionOp {
    b: usize,
    n: usize,
    m: usize,
    heads: usize,
    /// Numbers of a head.
    d: usize,
    causal: bool,
    /// The log-sum-exp of each query's scores `[B, heads, N]`, in base 2: the forward writes it for the backward.
    lse: Option<Tensor>,
}

impl AttentionOp {
    /// The kernel that computes a part of this in `dtype`.
    fn kernel(&self, part: Part, dtype: DType) -> Result<Launch> {
        let tiles = Tiles::new(part, dtype, self.d)?;
        let (name, length) = match part {
            Part::Forward => ("forward", self.n),
            Part::BackwardQ => ("backward_q", self.n),
            Part::BackwardKv => ("backward_kv", self.m),
        };
        let Tiles {
            width,
            rows,
            columns,
            warps,
        } = tiles;
        let name = format!("attention_{name}_{width}x{rows}x{columns}x{warps}");
        let grid = [length.div_ceil(rows), self.b * self.heads, 1];
        let shared = tiles.shared(part, dtype) as u32;
        Ok(Launch::new(module(dtype), &name, dtype, grid, 32 * warps as u32).with_shared(shared))
    }

    /// The last arguments of each kernel.
    fn sizes(&self) -> Result<[Arg<'static>; 5]> {
        Ok([
            Arg::int(self.n)?,
            Arg::int(self.m)?,
            Arg::int(self.heads)?,
            Arg::int(self.d)?,
            Arg::Int(self.causal.into()),
        ])
    }

    /// `Σ out·grad` over the numbers of each head: `[B, heads, N]`.
    fn delta(&self, out: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let delta = empty((self.b, self.heads, self.n), DType::F32, out.device())?;
        let count = delta.elem_count();
        let blocks = (32 * count).div_ceil(THREADS as usize);
        let kernel = Launch::new(
            module(out.dtype()),
            "attention_delta",
            out.dtype(),
            [blocks, 1, 1],
            THREADS,
        );
        let args = [
            Arg::Tensor(out),
            Arg::Tensor(grad),
            Arg::Tensor(&delta),
            Arg::int(self.n)?,
            Arg::int(self.heads)?,
            Arg::int(self.d)?,
            Arg::long(count),
        ];
        launch(out, &kernel, &args)?;
        Ok(delta)
    }
}

impl AutogradOp<3> for AttentionOp {
    const NAME: &'static str = "attention";

    fn forward(&self, [q, k, v]: [&Tensor; 3]) -> Result<OpResult> {
        let out = Output::new(q.shape(), q.dtype(), q.device())?;
        let operands = [
            Arg::Tensor(q),
            Arg::Tensor(k),
            Arg::Tensor(v),
            Arg::Output(&out),
            Arg::optional(self.lse.as_ref()),
        ];
        let args = [&operands[..], &self.sizes()?].concat();
        launch(q, &self.kernel(Part::Forward, q.dtype())?, &args)?;
        Ok(out.into())
    }

    fn backward(&self, _: [&Tensor; 3], _: &Tensor) -> Result<[Option<Tensor>; 3]> {
        bail!("attention's backward needs its result")
    }

    fn backward_with_result(
        &self,
        operands @ [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let Some(lse) = &self.lse else {
            bail!("attention's backward needs what the forward keeps for tracked operands");
        };
        let grad = grad.contiguous()?;
        let delta = self.delta(out, &grad)?;
        let grads = operands.map(|x| x.track_op().then(|| empty_like(x)).transpose());
        let [q_grad, k_grad, v_grad] = grads;
        let (q_grad, k_grad, v_grad) = (q_grad?, k_grad?, v_grad?);
        let given = [
            Arg::Tensor(q),
            Arg::Tensor(k),
            Arg::Tensor(v),
            Arg::Tensor(&grad),
            Arg::Tensor(lse),
            Arg::Tensor(&delta),
        ];
        let (sizes, dtype) = (self.sizes()?, q.dtype());
        if let Some(q_grad) = &q_grad {
            let args = [&given[..], &[Arg::Tensor(q_grad)], &sizes].concat();
            launch(q, &self.kernel(Part::BackwardQ, dtype)?, &args)?;
        }
        if k_grad.is_some() || v_grad.is_some() {
            let wanted = [&k_grad, &v_grad].map(|grad| Arg::optional(grad.as_ref()));
            let args = [&given[..], &wanted, &sizes].concat();
            launch(q, &self.kernel(Part::BackwardKv, dtype)?, &args)?;
        }
        Ok([q_grad, k_grad, v_grad])
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::{assert_close, random};
    use crate::ops::{self, Attention};

    /// Attention of `[b, n, heads·d]` to `[b, m, heads·d]`, in every dtype, against the CPU's.
    fn check_shape([b, n, m, heads, d]: [usize; 5], causal: bool) -> Result<()> {
        let c = heads * d;
        let inputs = [
            random(&[b, n, c], 1)?,
            random(&[b, m, c], 2)?,
            random(&[b, m, c], 3)?,
        ];
        let reference = |t: &[Tensor]| {
            let kind = Attention::MemoryEfficient;
            crate::ops::attention(&t[0], &t[1], &t[2], heads, causal, kind)
        };
        let kernels = |t: &[Tensor]| attention(&t[0], &t[1], &t[2], heads, causal);
        check(&inputs, &kernels, &reference)
    }

    #[test]
    fn cuda_attention_of_narrow_heads_equals_the_cpu() -> Result<()> {
        check_shape([2, 5, 7, 2, 4], false)?;
        check_shape([1, 1, 77, 2, 3], false)?;
        check_shape([2, 33, 33, 2, 8], true)
    }

    #[test]
    fn cuda_attention_of_40_numbers_equals_the_cpu() -> Result<()> {
        check_shape([2, 70, 77, 2, 40], false)
    }

    #[test]
    fn cuda_attention_of_several_tiles_equals_the_cpu() -> Result<()> {
        check_shape([1, 200, 131, 1, 40], false)
    }

    #[test]
    fn cuda_attention_with_a_causal_mask_equals_the_cpu() -> Result<()> {
        check_shape([1, 141, 141, 1, 64], true)
    }

    #[test]
    fn cuda_attention_of_64_numbers_equals_the_cpu() -> Result<()> {
        check_shape([1, 67, 77, 2, 64], false)
    }

    #[test]
    fn cuda_attention_of_80_numbers_equals_the_cpu() -> Result<()> {
        check_shape([1, 70, 77, 2, 80], false)
    }

    #[test]
    fn cuda_attention_of_160_numbers_equals_the_cpu() -> Result<()> {
        check_shape([1, 37, 77, 2, 160], false)?;
        check_shape([1, 70, 70, 1, 150], true)
    }

    /// The scores reach some hundreds, so that an exponential without the row's greatest score overflows.
    #[test]
    fn cuda_attention_of_large_scores_equals_the_cpu() -> Result<()> {
        let inputs = [1, 2, 3].map(|seed| random(&[1, 40, 16], seed)?.to_dtype(DType::F32));
        let [q, k, v] = inputs;
        let (q, k, v) = ((q? * 20.)?, (k? * 20.)?, v?);
        let got = attention(&q, &k, &v, 1, false)?;
        let want = crate::ops::attention(&q, &k, &v, 1, false, Attention::MemoryEfficient)?;
        assert_close(
            &got.to_dtype(DType::F64)?,
            &want.to_dtype(DType::F64)?,
            1e-4,
        )
    }

    #[test]
    fn cuda_attention_gives_no_gradient_to_frozen_operands() -> Result<()> {
        let inputs = [1, 2, 3].map(|seed| random(&[1, 5, 8], seed)?.to_dtype(DType::F32));
        let [q, k, v] = inputs;
        let (q, k, v) = (q?, k?, Var::from_tensor(&v?)?);
        let gradients = |q: &Tensor, v: &Tensor| {
            ops::gradients(|| Ok((attention(q, &k, v, 2, false)?.sum_all()?, ())))
        };
        let (grads, ()) = gradients(&q, &v)?;
        assert!(grads.get(&v).is_some() && grads.get(&q).is_none() && grads.get(&k).is_none());
        let q = Var::from_tensor(&q)?;
        let (grads, ()) = gradients(&q, &v.detach())?;
        assert!(grads.get(&q).is_some() && grads.get(&k).is_none());
        Ok(())
    }

    #[test]
    fn cuda_attention_refuses_wider_heads() -> Result<()> {
        let x = random(&[1, 2, WIDEST + 1], 1)?.to_dtype(DType::F16)?;
        let error = attention(&x, &x, &x, 1, false).unwrap_err().to_string();
        assert!(error.contains("up to 160 numbers, not 161"), "{error}");
        Ok(())
    }

    #[test]
    fn shared_memory_fits_every_card_from_compute_capability_8_on() -> Result<()> {
        for part in [Part::Forward, Part::BackwardQ, Part::BackwardKv] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                for d in [40, 64, 80, 160] {
                    let shared = Tiles::new(part, dtype, d)?.shared(part, dtype);
                    assert!(shared <= 99 << 10, "{part:?} {dtype:?} {d}: {shared}");
                }
            }
        }
        Ok(())
    }
}
