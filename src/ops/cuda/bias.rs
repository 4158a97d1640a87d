//! Biases of convolutions and linear layers: added in place, and their gradients.

use candle_core::{DType, Result, Tensor, bail};

use super::gpu::{Arg, Launch, Module, THREADS, address, empty, launch, module};

const MODULE: Module = module!("bias");

/// Adds a bias to the elements of each channel, in place, with one launch.
///
/// `x`: contiguous, of `dtype`, `[outer, channels, inner]`: a linear layer's result is `[rows, channels, 1]`, a feature map
/// `[B, channels, H·W]`. `bias`: contiguous, `channels` numbers, or `outer·channels` for a bias of each image's own; in `dtype`
/// or in `f32`.
pub(super) fn add_bias(x: Arg<'_>, dtype: DType, shape: [usize; 3], bias: &Tensor) -> Result<()> {
    add_bias_into(x, x, dtype, shape, bias)
}

/// As [`add_bias`], into `out` of the shape of `x`.
pub(super) fn add_bias_into(
    x: Arg<'_>,
    out: Arg<'_>,
    dtype: DType,
    [outer, channels, inner]: [usize; 3],
    bias: &Tensor,
) -> Result<()> {
    let biases = bias.elem_count();
    if biases != channels && biases != outer * channels {
        bail!("a bias of {biases} for {outer}·{channels} channels");
    }
    let count = outer * channels * inner;
    let sizes = [
        x,
        out,
        Arg::Tensor(bias),
        wide(bias, dtype)?,
        Arg::long(count),
    ];
    if inner == 1 && biases == channels {
        let kernel = elementwise("bias_add_to_rows", dtype, count);
        launch(
            bias,
            &kernel,
            &[&sizes[..], &[Arg::int(channels)?]].concat(),
        )
    } else {
        let kernel = elementwise("bias_add_to_maps", dtype, count);
        let rest = [Arg::long(inner), Arg::int(biases)?];
        launch(bias, &kernel, &[&sizes[..], &rest].concat())
    }
}

/// The gradient of the bias of [`add_bias`], of its shape and dtype, given that of `x`: sums in `f32`, in a fixed order. One
/// launch for a bias of each image's own, else two.
pub(super) fn bias_grad(
    grad: &Tensor,
    [outer, channels, inner]: [usize; 3],
    bias: &Tensor,
) -> Result<Tensor> {
    let sums = empty(bias.shape(), bias.dtype(), bias.device())?;
    if inner == 1 && bias.elem_count() == channels {
        let parts = column_sums(grad, outer, channels)?;
        sum_rows(&parts, &sums)?;
    } else if bias.elem_count() == outer * channels {
        plane_sums(grad, outer * channels, inner, &sums)?;
    } else {
        let parts = empty((outer, channels), DType::F32, grad.device())?;
        plane_sums(grad, outer * channels, inner, &parts)?;
        sum_rows(&parts, &sums)?;
    }
    Ok(sums)
}

/// A launch over `elements` that are mostly read and written in packs of 16 bytes.
pub(super) fn packed(module: Module, name: &str, dtype: DType, elements: usize) -> Launch {
    Launch::elementwise(module, name, dtype, elements.div_ceil(lanes(dtype)))
}

fn elementwise(name: &str, dtype: DType, elements: usize) -> Launch {
    packed(MODULE, name, dtype, elements)
}

/// Whether a parameter of tensors of `dtype` is wider than they are: `f32` beside 16-bit numbers.
pub(super) fn wide(parameter: &Tensor, dtype: DType) -> Result<Arg<'static>> {
    match parameter.dtype() {
        same if same == dtype => Ok(Arg::Int(0)),
        DType::F32 => Ok(Arg::Int(1)),
        other => bail!("parameters in {other:?} of numbers in {dtype:?}"),
    }
}

/// How the blocks of a grid share the columns and the rows of a matrix, as `Tile` of `vector.cuh` has it.
///
/// Given by shape, type and alignment, as the order of sums is.
pub(super) struct Tiles {
    /// Whether a thread has a pack of columns, and not one.
    pub(super) packed: bool,
    /// Blocks that share the columns.
    pub(super) columns: usize,
    /// Blocks that share the rows.
    pub(super) rows: usize,
    /// Rows of a block.
    pub(super) each: usize,
}

impl Tiles {
    /// Blocks of [`THREADS`] for contiguous `rows` of `width`, all of the type of the first.
    pub(super) fn new(rows: usize, width: usize, tensors: &[&Tensor]) -> Result<Self> {
        /// Blocks that fill the largest cards.
        const BLOCKS: usize = 512;
        /// Rows that a thread adds up at least.
        const DEPTH: usize = 8;

        let lanes = lanes(tensors[0].dtype());
        let mut packed = width.is_multiple_of(lanes);
        for tensor in tensors {
            packed &= address(tensor)? % 16 == 0;
        }
        let threads = if packed { width / lanes } else { width };
        let columns = threads.div_ceil(THREADS as usize);
        let side_by_side = THREADS as usize / threads.div_ceil(columns);
        let each = rows
            .div_ceil(BLOCKS.div_ceil(columns))
            .max(DEPTH * side_by_side);
        Ok(Self {
            packed,
            columns,
            rows: rows.div_ceil(each),
            each,
        })
    }
}

/// Numbers of a pack of 16 bytes.
pub(super) fn lanes(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// The sums of the columns of blocks of rows: `[blocks, width]` in `f32`.
fn column_sums(x: &Tensor, rows: usize, width: usize) -> Result<Tensor> {
    let tiles = Tiles::new(rows, width, &[x])?;
    let parts = empty((tiles.rows, width), DType::F32, x.device())?;
    let grid = [tiles.columns, tiles.rows, 1];
    let kernel = Launch::new(MODULE, "bias_sum_columns", x.dtype(), grid, THREADS)
        .with_shared(THREADS * lanes(x.dtype()) as u32 * 4);
    launch(
        x,
        &kernel,
        &[
            Arg::Tensor(x),
            Arg::Tensor(&parts),
            Arg::int(rows)?,
            Arg::int(width)?,
            Arg::int(tiles.each)?,
            Arg::Int(tiles.packed.into()),
        ],
    )?;
    Ok(parts)
}

/// The sum of each of `planes` planes of `inner` numbers, into `sums`, which is of the dtype of `x` or of `f32`.
fn plane_sums(x: &Tensor, planes: usize, inner: usize, sums: &Tensor) -> Result<()> {
    let blocks = planes.div_ceil(THREADS as usize / 32);
    let kernel = Launch::new(
        MODULE,
        "bias_sum_planes",
        x.dtype(),
        [blocks, 1, 1],
        THREADS,
    );
    launch(
        x,
        &kernel,
        &[
            Arg::Tensor(x),
            Arg::Tensor(sums),
            wide(sums, x.dtype())?,
            Arg::int(planes)?,
            Arg::long(inner),
        ],
    )
}

/// The sums over the rows of `parts`, `[rows, columns]` in `f32`, into `out`.
fn sum_rows(parts: &Tensor, out: &Tensor) -> Result<()> {
    let (rows, columns) = parts.dims2()?;
    let kernel = row_sums(MODULE, "bias_sum_rows", out.dtype(), [columns, 1]);
    let args = [Arg::Tensor(parts), Arg::Tensor(out)];
    let sizes = [Arg::int(rows)?, Arg::int(columns)?];
    launch(parts, &kernel, &[&args[..], &sizes].concat())
}

/// The launch of a kernel that calls `sum_rows` of `vector.cuh` for `columns` of each of `matrices`.
pub(super) fn row_sums(
    module: Module,
    name: &str,
    dtype: DType,
    [columns, matrices]: [usize; 2],
) -> Launch {
    const THREADS: u32 = 512;
    let grid = [columns.div_ceil(32), matrices, 1];
    Launch::new(module, name, dtype, grid, THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradcheck::{assert_close, random};

    /// Numbers as a kernel sees them, and as `f64`.
    fn rounded(shape: &[usize], seed: u64, dtype: DType) -> Result<(Tensor, Tensor)> {
        let x = random(shape, seed)?.to_dtype(dtype)?;
        let exact = x.to_dtype(DType::F64)?;
        Ok((x, exact))
    }

    #[test]
    fn cuda_biases_equal_candles() -> Result<()> {
        // Rows: packs, odd sizes, blocks of rows, tiles of columns. Maps: odd sizes, packs.
        let cases = [
            ([70, 24, 1], false),
            ([3, 5, 1], false),
            ([3, 5, 1], true),
            ([300, 64, 1], false),
            ([9, 2056, 1], false),
            ([2, 5, 7], false),
            ([2, 5, 7], true),
            ([3, 2, 264], false),
            ([3, 2, 264], true),
        ];
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (shape, own) in cases {
                for held in [dtype, DType::F32] {
                    check(shape, own, dtype, held)?;
                }
            }
        }
        Ok(())
    }

    fn check(shape: [usize; 3], own: bool, dtype: DType, held: DType) -> Result<()> {
        let tolerance = if dtype == DType::F32 { 1e-6 } else { 1e-2 };
        let [outer, channels, _] = shape;
        let images = if own { outer } else { 1 };
        let (bias, exact_bias) = rounded(&[images, channels], 2, held)?;
        let exact_bias = exact_bias.reshape((images, channels, 1))?;
        let (x, exact) = rounded(&shape, 1, dtype)?;
        let x = x.copy()?;
        add_bias(Arg::Tensor(&x), dtype, shape, &bias)?;
        let want = exact.broadcast_add(&exact_bias)?;
        assert_close(&x.to_dtype(DType::F64)?, &want, tolerance)?;

        let (grad, exact) = rounded(&shape, 3, dtype)?;
        let got = bias_grad(&grad, shape, &bias)?;
        assert_eq!((got.dtype(), got.dims()), (held, bias.dims()));
        let want = exact.sum_keepdim(2)?;
        let want = if own { want } else { want.sum_keepdim(0)? };
        let want = want.reshape(bias.dims())?;
        let scale = want.abs()?.max_all()?.to_scalar::<f64>()?;
        assert_close(&got.to_dtype(DType::F64)?, &want, 2.0 * tolerance * scale)
    }
}
