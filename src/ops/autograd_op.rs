//! Functions with a backward of their own.

use candle_core::{Result, Shape, Storage, Tensor, Var, bail, op::BackpropOp};

use super::tape::{Mode, Tape};

/// A function of `N` tensors with a backward of its own.
pub(super) trait AutogradOp<const N: usize>: Send + Sync + 'static {
    /// Named in errors.
    const NAME: &'static str;

    /// The result for operands that carry no graph.
    fn forward(&self, operands: [&Tensor; N]) -> Result<OpResult>;

    /// A gradient for each operand that is tracked, of its shape and dtype, given the result's.
    fn backward(&self, operands: [&Tensor; N], grad: &Tensor) -> Result<[Option<Tensor>; N]>;

    /// As [`Self::backward`], for an operation that needs its result again.
    fn backward_with_result(
        &self,
        operands: [&Tensor; N],
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        self.backward(operands, grad)
    }
}

/// `op` of `operands`, recorded on the tape of this thread if one of them is tracked.
///
/// # Errors
/// When `op` fails, or an operand is tracked and this thread neither records a pass nor is in [`no_grad`](super::no_grad): the
/// gradients would be lost.
pub(super) fn apply<F, const N: usize>(op: F, operands: [&Tensor; N]) -> Result<Tensor>
where
    F: AutogradOp<N>,
{
    let detached = operands.map(Tensor::detach);
    let mode = match operands.into_iter().any(Tensor::track_op) {
        true => Tape::mode(),
        false => Mode::NoGrad,
    };
    match mode {
        Mode::NoGrad => Ok(op.forward(detached.each_ref())?.into_tensor()),
        Mode::Recording => {
            let result = op.forward(detached.each_ref())?;
            Tape::push(operands, result, move |operands, result, grad| {
                op.backward_with_result(operands, result, grad)
            })
        }
        Mode::Outside => bail!(
            "{} of a variable outside ops::gradients, which records its backward, and ops::no_grad",
            F::NAME
        ),
    }
}

/// Whether [`apply`] records an operation of these operands, so that its backward may follow.
pub(super) fn is_recorded(operands: &[&Tensor]) -> bool {
    operands.iter().any(|x| x.track_op()) && Tape::mode() == Mode::Recording
}

/// The gradient of an operand, if that is tracked.
pub(super) fn if_tracked(
    operand: &Tensor,
    gradient: impl FnOnce() -> Result<Tensor>,
) -> Result<Option<Tensor>> {
    operand.track_op().then(gradient).transpose()
}

/// The result of an [`AutogradOp`].
#[derive(Debug)]
pub(super) enum OpResult {
    /// A tensor whose storage others may share. As a variable it is copied: candle gives no way to move its storage.
    Shared(Tensor),
    /// Storage of its own, contiguous, with its shape.
    Owned(Storage, Shape),
}

impl OpResult {
    /// The result as a tensor without a graph.
    pub(super) fn into_tensor(self) -> Tensor {
        match self {
            Self::Shared(tensor) => tensor.detach(),
            Self::Owned(storage, shape) => from_storage(storage, shape, false),
        }
    }

    /// The result as a variable: a leaf of candle's graph.
    pub(super) fn into_variable(self) -> Result<Tensor> {
        match self {
            Self::Shared(tensor) => Ok(Var::from_tensor(&tensor)?.into_inner()),
            Self::Owned(storage, shape) => Ok(from_storage(storage, shape, true)),
        }
    }
}

fn from_storage(storage: Storage, shape: Shape, is_variable: bool) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), is_variable)
}

impl From<Tensor> for OpResult {
    fn from(tensor: Tensor) -> Self {
        Self::Shared(tensor)
    }
}
