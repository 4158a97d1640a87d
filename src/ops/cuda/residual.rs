//! [`ops::add`](crate::ops::add()), [`ops::add_to_rows`](crate::ops::add_to_rows()) and
//! [`ops::concatenate`](crate::ops::concatenate()) by kernels.

use candle_core::{D, Result, Tensor};

use super::bias::{add_bias_into, bias_grad, packed};
use super::gpu::{Arg, Module, Output, empty_like, launch, module};
use crate::ops::autograd_op::{AutogradOp, OpResult, apply};

const MODULE: Module = module!("residual");

/// As [`crate::ops::add()`], which checks the shapes.
pub(in crate::ops) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply(Add, [&a.contiguous()?, &b.contiguous()?])
}

/// As [`crate::ops::add_to_rows()`], which checks the shapes.
pub(in crate::ops) fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    apply(AddToRows, [&x.contiguous()?, &row.contiguous()?])
}

/// As [`crate::ops::concatenate()`], which checks the shapes.
pub(in crate::ops) fn concatenate(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply(Concatenate, [&a.contiguous()?, &b.contiguous()?])
}

struct Add;

impl AutogradOp<2> for Add {
    const NAME: &'static str = "add";

    fn forward(&self, [a, b]: [&Tensor; 2]) -> Result<OpResult> {
        let (out, count) = (
            Output::new(a.shape(), a.dtype(), a.device())?,
            a.elem_count(),
        );
        let kernel = packed(MODULE, "add", a.dtype(), count);
        launch(
            a,
            &kernel,
            &[
                Arg::Tensor(a),
                Arg::Tensor(b),
                Arg::Output(&out),
                Arg::long(count),
            ],
        )?;
        Ok(out.into())
    }

    fn backward(&self, [a, b]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        Ok([a, b].map(|operand| operand.track_op().then(|| grad.clone())))
    }
}

struct AddToRows;

impl AddToRows {
    fn shape(x: &Tensor) -> Result<[usize; 3]> {
        let width = x.dim(D::Minus1)?;
        Ok([x.elem_count() / width, width, 1])
    }
}

impl AutogradOp<2> for AddToRows {
    const NAME: &'static str = "add_to_rows";

    fn forward(&self, [x, row]: [&Tensor; 2]) -> Result<OpResult> {
        let out = Output::new(x.shape(), x.dtype(), x.device())?;
        let (from, to) = (Arg::Tensor(x), Arg::Output(&out));
        add_bias_into(from, to, x.dtype(), Self::shape(x)?, row)?;
        Ok(out.into())
    }

    fn backward(&self, [x, row]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let row_grad = || bias_grad(&grad.contiguous()?, Self::shape(x)?, row);
        Ok([
            x.track_op().then(|| grad.clone()),
            row.track_op().then(row_grad).transpose()?,
        ])
    }
}

struct Concatenate;

impl Concatenate {
    /// Copies between `a`, `b` and `joined`, to the two if `apart`.
    fn copy([a, b]: [&Tensor; 2], parts: [Arg<'_>; 2], joined: Arg<'_>, apart: bool) -> Result<()> {
        let rows = a.dim(0)?;
        let kernel = packed(MODULE, "join", a.dtype(), a.elem_count() + b.elem_count());
        launch(
            a,
            &kernel,
            &[
                parts[0],
                parts[1],
                joined,
                Arg::long(rows),
                Arg::long(a.elem_count() / rows),
                Arg::long(b.elem_count() / rows),
                Arg::Int(apart.into()),
            ],
        )
    }
}

impl AutogradOp<2> for Concatenate {
    const NAME: &'static str = "concatenate";

    fn forward(&self, [a, b]: [&Tensor; 2]) -> Result<OpResult> {
        let mut shape = a.dims().to_vec();
        shape[1] += b.dim(1)?;
        let out = Output::new(shape, a.dtype(), a.device())?;
        let parts = [Arg::Tensor(a), Arg::Tensor(b)];
        Self::copy([a, b], parts, Arg::Output(&out), false)?;
        Ok(out.into())
    }

    fn backward(&self, [a, b]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (a_grad, b_grad) = (empty_like(a)?, empty_like(b)?);
        let parts = [Arg::Tensor(&a_grad), Arg::Tensor(&b_grad)];
        Self::copy([a, b], parts, Arg::Tensor(&grad.contiguous()?), true)?;
        Ok([Some(a_grad), Some(b_grad)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::host::check;
    use crate::ops::gradcheck::random;

    #[test]
    fn cuda_sums_equal_candles() -> Result<()> {
        for shape in [&[3, 25][..], &[2, 64]] {
            let inputs = [random(shape, 1)?, random(shape, 2)?];
            check(&inputs, &|t| add(&t[0], &t[1]), &|t| &t[0] + &t[1])?;
            let inputs = [random(shape, 1)?, random(&shape[1..], 2)?];
            let reference = |t: &[Tensor]| t[0].broadcast_add(&t[1]);
            check(&inputs, &|t| add_to_rows(&t[0], &t[1]), &reference)?;
        }
        Ok(())
    }

    #[test]
    fn cuda_concatenation_equals_candles() -> Result<()> {
        for (left, right) in [(3, 5), (8, 16)] {
            let inputs = [random(&[2, left, 3, 5], 1)?, random(&[2, right, 3, 5], 2)?];
            let inputs = if left == 8 {
                inputs
                    .map(|x| x.narrow(2, 0, 1))
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?
            } else {
                inputs.to_vec()
            };
            let reference = |t: &[Tensor]| Tensor::cat(t, 1);
            check(&inputs, &|t| concatenate(&t[0], &t[1]), &reference)?;
        }
        Ok(())
    }
}
