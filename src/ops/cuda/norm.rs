//! [`ops::group_norm`](crate::ops::group_norm()) and [`ops::layer_norm`](crate::ops::layer_norm()) by kernels.

use std::sync::OnceLock;

use candle_core::{D, DType, Result, Tensor, bail};

use super::bias::{Tiles, lanes, row_sums, wide};
use super::gpu::{Arg, Launch, Module, Output, THREADS, empty, empty_like, launch, module};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply, is_recorded};

const MODULE: Module = module!("norm");

/// As [`crate::ops::group_norm()`], which checks the shapes.
pub(in crate::ops) fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let op = GroupNorm {
        groups,
        eps,
        silu,
        stats: Stats::of([x, weight, bias]),
    };
    apply_norm(op, [x, weight, bias])
}

/// As [`crate::ops::layer_norm()`], which checks the shapes.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let stats = Stats::of([x, weight, bias]);
    apply_norm(LayerNorm { eps, stats }, [x, weight, bias])
}

fn apply_norm(op: impl AutogradOp<3>, [x, weight, bias]: [&Tensor; 3]) -> Result<Tensor> {
    if weight.dtype() != bias.dtype() {
        let (weight, bias) = (weight.dtype(), bias.dtype());
        bail!("a norm with weights in {weight:?} and biases in {bias:?}");
    }
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    apply(op, [&x, &weight, &bias])
}

/// Mean and reciprocal standard deviation of each row, `[rows, 2]` in `f32`: of the forward, for the backward.
struct Stats {
    kept: OnceLock<Tensor>,
    wanted: bool,
}

impl Stats {
    /// Of an operation of these operands.
    fn of(operands: [&Tensor; 3]) -> Self {
        Self {
            kept: OnceLock::new(),
            wanted: is_recorded(&operands),
        }
    }

    /// For the forward to fill, if there will be a backward.
    fn make(&self, rows: usize, like: &Tensor) -> Result<Arg<'_>> {
        if self.wanted {
            let stats = empty((rows, 2), DType::F32, like.device())?;
            return Ok(Arg::Tensor(self.kept.get_or_init(|| stats)));
        }
        Ok(Arg::Null)
    }

    fn get(&self) -> Result<Arg<'_>> {
        match self.kept.get() {
            Some(stats) => Ok(Arg::Tensor(stats)),
            None => bail!("a norm's backward without its forward"),
        }
    }
}

/// Weight and bias as kernels take them: two addresses, and whether they are wider than `x`.
fn parameters<'a>(x: &Tensor, weight: &'a Tensor, bias: &'a Tensor) -> Result<[Arg<'a>; 3]> {
    let wide = wide(weight, x.dtype())?;
    Ok([Arg::Tensor(weight), Arg::Tensor(bias), wide])
}

/// The gradients of weight and bias, of those that are tracked: the sums over the rows of `parts`, `[rows, 2, width]` in `f32`.
fn parameter_grads(parts: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<[Option<Tensor>; 2]> {
    if !weight.track_op() && !bias.track_op() {
        return Ok([None, None]);
    }
    let (rows, _, width) = parts.dims3()?;
    let grad = |of: &Tensor| of.track_op().then(|| empty_like(of)).transpose();
    let grads = [grad(weight)?, grad(bias)?];
    let kernel = row_sums(MODULE, "norm_parameter_grads", weight.dtype(), [width, 2]);
    launch(
        parts,
        &kernel,
        &[
            Arg::Tensor(parts),
            Arg::optional(grads[0].as_ref()),
            Arg::optional(grads[1].as_ref()),
            Arg::int(rows)?,
            Arg::int(width)?,
        ],
    )?;
    Ok(grads)
}

struct GroupNorm {
    groups: usize,
    eps: f64,
    silu: bool,
    stats: Stats,
}

/// The sizes of a group norm's `x`. A row is a group of an image.
struct Groups {
    images: usize,
    groups: usize,
    /// Channels of a group.
    channels: usize,
    /// Pixels of a channel.
    pixels: usize,
}

impl Groups {
    fn rows(&self) -> usize {
        self.images * self.groups
    }

    /// Numbers of a row.
    fn size(&self) -> usize {
        self.channels * self.pixels
    }

    /// Blocks that share a row if there should be `blocks` in all, and the numbers of each: whole packs.
    fn shares(&self, blocks: usize) -> (usize, usize) {
        /// Numbers of a block at least.
        const LEAST: usize = 1 << 13;
        let shares = (blocks / self.rows()).clamp(1, self.size().div_ceil(LEAST));
        let each = self.size().div_ceil(shares).next_multiple_of(8);
        (self.size().div_ceil(each), each)
    }

    fn args(&self) -> Result<[Arg<'static>; 3]> {
        Ok([
            Arg::int(self.groups)?,
            Arg::int(self.channels)?,
            Arg::long(self.pixels),
        ])
    }
}

/// Threads of a block that goes through `numbers`: whole warps, with some numbers for each thread.
fn threads(numbers: usize) -> u32 {
    let threads = (numbers / 32).next_multiple_of(32).clamp(64, 512);
    threads as u32
}

impl GroupNorm {
    fn sizes(&self, x: &Tensor) -> Result<Groups> {
        let (images, channels) = (x.dim(0)?, x.dim(1)?);
        Ok(Groups {
            images,
            groups: self.groups,
            channels: channels / self.groups,
            pixels: x.dims()[2..].iter().product(),
        })
    }
}

impl AutogradOp<3> for GroupNorm {
    const NAME: &'static str = "group_norm";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        /// Numbers that a block reads twice without going to memory for them.
        const CACHED: usize = 1 << 16;

        let sizes = self.sizes(x)?;
        let out = Output::new(x.shape(), x.dtype(), x.device())?;
        // A block for each row where these occupy the card, else several.
        let blocks = if sizes.size() <= CACHED { 256 } else { 1024 };
        let (shares, each) = sizes.shares(blocks);
        let (grid, threads) = ([sizes.rows(), shares, 1], threads(each));
        let parts = if shares > 1 {
            let parts = empty((sizes.rows(), shares, 2), DType::F32, x.device())?;
            let kernel = Launch::new(MODULE, "group_norm_parts", x.dtype(), grid, threads);
            let args = [Arg::Tensor(x), Arg::Tensor(&parts)];
            let args = [&args[..], &[Arg::long(sizes.size()), Arg::long(each)]].concat();
            launch(x, &kernel, &args)?;
            Some(parts)
        } else {
            None
        };
        let kernel = Launch::new(MODULE, "group_norm_forward", x.dtype(), grid, threads);
        let args = [
            &[Arg::Tensor(x), Arg::Output(&out)][..],
            &parameters(x, weight, bias)?,
            &[
                Arg::optional(parts.as_ref()),
                self.stats.make(sizes.rows(), x)?,
            ],
            &sizes.args()?,
            &[
                Arg::long(each),
                Arg::Float(self.eps as f32),
                Arg::Int(self.silu.into()),
            ],
        ];
        launch(x, &kernel, &args.concat())?;
        Ok(out.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (sizes, grad) = (self.sizes(x)?, grad.contiguous()?);
        let (channels, silu) = (x.dim(1)?, Arg::Int(self.silu.into()));
        let operands = [
            &[Arg::Tensor(x), Arg::Tensor(&grad)][..],
            &parameters(x, weight, bias)?,
            &[self.stats.get()?],
        ]
        .concat();
        let sums = empty((sizes.images, 2, channels), DType::F32, x.device())?;
        group_sums(&operands, &sizes, silu, &sums, x)?;

        let x_grad = x.track_op().then(|| empty_like(x)).transpose()?;
        if let Some(x_grad) = &x_grad {
            let (shares, each) = sizes.shares(2048);
            let grid = [sizes.rows(), shares, 1];
            let threads = threads(each).min(THREADS);
            let kernel = Launch::new(MODULE, "group_norm_backward", x.dtype(), grid, threads);
            let args = [
                &operands[..],
                &[Arg::Tensor(&sums), Arg::Tensor(x_grad)],
                &sizes.args()?,
                &[Arg::long(each), silu],
            ];
            launch(x, &kernel, &args.concat())?;
        }
        let [weight_grad, bias_grad] = parameter_grads(&sums, weight, bias)?;
        Ok([x_grad, weight_grad, bias_grad])
    }
}

/// The gradients of each image's channels, `[B, 2, channels]`.
fn group_sums(
    operands: &[Arg<'_>],
    sizes: &Groups,
    silu: Arg<'_>,
    sums: &Tensor,
    x: &Tensor,
) -> Result<()> {
    /// Pixels from which on a channel has a block.
    const BLOCK: usize = 1 << 14;

    let (planes, by_block) = (sizes.rows() * sizes.channels, sizes.pixels >= BLOCK);
    let each = if by_block { 1 } else { THREADS as usize / 32 };
    let grid = [planes.div_ceil(each), 1, 1];
    let kernel = Launch::new(MODULE, "group_norm_sums", x.dtype(), grid, THREADS);
    let args = [
        operands,
        &[Arg::Tensor(sums), Arg::int(planes)?],
        &sizes.args()?,
        &[silu, Arg::Int(by_block.into())],
    ];
    launch(x, &kernel, &args.concat())
}

struct LayerNorm {
    eps: f64,
    stats: Stats,
}

impl AutogradOp<3> for LayerNorm {
    const NAME: &'static str = "layer_norm";

    fn forward(&self, [x, weight, bias]: [&Tensor; 3]) -> Result<OpResult> {
        let width = x.dim(D::Minus1)?;
        let rows = x.elem_count() / width;
        let out = Output::new(x.shape(), x.dtype(), x.device())?;
        let grid = [rows.div_ceil(THREADS as usize / 32), 1, 1];
        let kernel = Launch::new(MODULE, "layer_norm_forward", x.dtype(), grid, THREADS);
        let args = [
            &[Arg::Tensor(x), Arg::Output(&out)][..],
            &parameters(x, weight, bias)?,
            &[
                self.stats.make(rows, x)?,
                Arg::int(rows)?,
                Arg::int(width)?,
                Arg::Float(self.eps as f32),
            ],
        ];
        launch(x, &kernel, &args.concat())?;
        Ok(out.into())
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let width = x.dim(D::Minus1)?;
        let rows = x.elem_count() / width;
        let grad = grad.contiguous()?;
        let x_grad = x.track_op().then(|| empty_like(x)).transpose()?;
        let mut tensors = vec![x, &grad, weight];
        tensors.extend(&x_grad);
        let tiles = Tiles::new(rows, width, &tensors)?;
        let parts = (weight.track_op() || bias.track_op())
            .then(|| empty((tiles.rows, 2, width), DType::F32, x.device()))
            .transpose()?;
        let grid = [tiles.columns, tiles.rows, 1];
        let kernel = Launch::new(MODULE, "layer_norm_backward", x.dtype(), grid, THREADS)
            .with_shared(THREADS * lanes(x.dtype()) as u32 * 4);
        launch(
            x,
            &kernel,
            &[
                Arg::Tensor(x),
                Arg::Tensor(&grad),
                Arg::Tensor(weight),
                wide(weight, x.dtype())?,
                self.stats.get()?,
                Arg::optional(x_grad.as_ref()),
                Arg::optional(parts.as_ref()),
                Arg::int(rows)?,
                Arg::int(width)?,
                Arg::int(tiles.each)?,
                Arg::Int(tiles.packed.into()),
            ],
        )?;
        let [weight_grad, bias_grad] = match &parts {
            Some(parts) => parameter_grads(parts, weight, bias)?,
            None => [None, None],
        };
        Ok([x_grad, weight_grad, bias_grad])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    /// A bias far from 0 shows whether the gradient before SiLU is right; a mean far from 0, whether the statistics are.
    fn operands(shape: &[usize], channels: usize) -> Result<[Tensor; 3]> {
        let (x, weight, bias) = (
            random(shape, 1)?,
            random(&[channels], 2)?,
            random(&[channels], 3)?,
        );
        Ok([(x + 0.5)?, (weight + 1.0)?, bias])
    }

    #[test]
    fn cuda_group_norm_equals_the_cpu() -> Result<()> {
        // One block a group; odd sizes; one pixel; several blocks a group; a block a channel.
        for (shape, groups) in [
            (&[2, 12, 8, 8][..], 3),
            (&[2, 6, 3, 5], 2),
            (&[3, 8], 2),
            (&[1, 4, 64, 81], 1),
            (&[1, 2, 128, 130], 2),
        ] {
            for silu in [false, true] {
                let norm = |t: &[Tensor]| group_norm(&t[0], &t[1], &t[2], groups, 1e-5, silu);
                let reference =
                    |t: &[Tensor]| crate::ops::group_norm(&t[0], &t[1], &t[2], groups, 1e-5, silu);
                check(&operands(shape, shape[1])?, &norm, &reference)?;
            }
        }
        Ok(())
    }

    #[test]
    fn cuda_layer_norm_equals_the_cpu() -> Result<()> {
        // Packs; odd sizes; several tiles of columns and blocks of rows.
        for shape in [&[2, 9, 64][..], &[3, 7], &[9, 2056], &[300, 24]] {
            let norm = |t: &[Tensor]| layer_norm(&t[0], &t[1], &t[2], 1e-5);
            let reference = |t: &[Tensor]| crate::ops::layer_norm(&t[0], &t[1], &t[2], 1e-5);
            check(&operands(shape, shape[shape.len() - 1])?, &norm, &reference)?;
        }
        Ok(())
    }

    #[test]
    fn cuda_norms_take_wide_parameters() -> Result<()> {
        let f32 = |x: &Tensor| x.to_dtype(DType::F32);
        let inputs = operands(&[2, 8, 16], 8)?;
        let norm = |t: &[Tensor]| group_norm(&t[0], &f32(&t[1])?, &f32(&t[2])?, 2, 1e-5, true);
        let reference = |t: &[Tensor]| crate::ops::group_norm(&t[0], &t[1], &t[2], 2, 1e-5, true);
        check(&inputs, &norm, &reference)?;
        let inputs = operands(&[5, 24], 24)?;
        let norm = |t: &[Tensor]| layer_norm(&t[0], &f32(&t[1])?, &f32(&t[2])?, 1e-5);
        let reference = |t: &[Tensor]| crate::ops::layer_norm(&t[0], &t[1], &t[2], 1e-5);
        check(&inputs, &norm, &reference)
    }

    #[test]
    fn cuda_norms_are_exact_far_from_zero() -> Result<()> {
        // 100 ± 0.01 in f32 has six bits after the point's own: the statistics may not lose them.
        let x = ((random(&[1, 2, 40, 80], 1)? * 0.01)? + 100.0)?.to_dtype(DType::F32)?;
        let (one, zero) = (
            Tensor::ones(2, DType::F32, x.device())?,
            Tensor::zeros(2, DType::F32, x.device())?,
        );
        let got = group_norm(&x, &one, &zero, 1, 1e-12, false)?.to_dtype(DType::F64)?;
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let want =
            crate::ops::group_norm(&wide(&x)?, &wide(&one)?, &wide(&zero)?, 1, 1e-12, false)?;
        crate::ops::gradcheck::assert_close(&got, &want, 2e-3)
    }

    #[test]
    fn cuda_frozen_norms_keep_nothing() -> Result<()> {
        let [x, weight, bias] = operands(&[2, 8, 4, 4], 8)?;
        let f32 = |x: &Tensor| x.to_dtype(DType::F32);
        let x = candle_core::Var::from_tensor(&f32(&x)?)?;
        let (weight, bias) = (f32(&weight)?, f32(&bias)?);
        let (grads, ()) = crate::ops::gradients(|| {
            let normed = group_norm(&x, &weight, &bias, 2, 1e-5, true)?;
            let normed = layer_norm(&normed.transpose(1, 3)?, &weight, &bias, 1e-5)?;
            Ok((normed.sum_all()?, ()))
        })?;
        assert!(grads.get(&x).is_some());
        assert!(grads.get(&weight).is_none());
        let frozen = group_norm(&x.detach(), &weight, &bias, 2, 1e-5, true)?;
        assert!(!frozen.track_op());
        Ok(())
    }
}
