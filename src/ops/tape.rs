//! Recording the operations of a pass, and the backward pass over the record.
//!
//! candle's backward pass adds each gradient to a tensor of zeros first: two allocations and three passes over memory for every
//! operand. A [`Tape`] passes gradients on as they are. Results of recorded operations are variables, so candle's own operations
//! may follow them, and candle's backward pass ends at them.

use std::cell::RefCell;
use std::fmt;

use candle_core::{Result, Tensor};

use super::autograd_op::OpResult;
use super::backward::{propagate, take_gradient};

thread_local! {
    static RECORDING: RefCell<Recording> = const { RefCell::new(Recording::Outside) };
}

/// What this thread does with operations on tracked tensors.
#[derive(Debug, Default)]
pub(super) enum Recording {
    /// They are refused.
    #[default]
    Outside,
    /// Their results have no graph.
    NoGrad,
    /// They are recorded.
    On(Tape),
}

/// [`Recording`] without its tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Outside,
    NoGrad,
    Recording,
}

impl Recording {
    /// Takes the state of this thread, so that it can be [`run`](Self::run) on another one and put back.
    pub(super) fn take() -> Self {
        RECORDING.take()
    }

    /// Ends what [`Self::take`] began.
    pub(super) fn put_back(self) {
        RECORDING.set(self);
    }

    /// Runs `work` on this thread in this state. Returns the state after it.
    pub(super) fn run<R>(self, work: impl FnOnce() -> R) -> (R, Self) {
        let outer = RECORDING.replace(self);
        let result = work();
        (result, RECORDING.replace(outer))
    }
}

/// Runs `pass` without recording it: its results carry no graph, whatever its operands are. As `torch.no_grad`.
///
/// candle's own operations on variables still build a graph.
pub fn no_grad<R>(pass: impl FnOnce() -> R) -> R {
    Recording::NoGrad.run(pass).0
}

/// The operations of a pass on tracked tensors, in the order of their computation.
#[derive(Debug, Default)]
pub(super) struct Tape(Vec<Entry>);

/// One operation.
struct Entry {
    result: Tensor,
    backward: Box<BackwardFn>,
}

/// From the gradient of a result to each tracked operand with its gradient.
type BackwardFn = dyn FnOnce(&Tensor) -> Result<Vec<(Tensor, Tensor)>> + Send + Sync;

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Entry").field(self.result.shape()).finish()
    }
}

impl Tape {
    /// Runs `pass` and records the tracked operations of this module that it computes.
    pub(super) fn record<R>(pass: impl FnOnce() -> Result<R>) -> Result<(R, Self)> {
        let (result, recording) = Recording::On(Self::default()).run(pass);
        let tape = match recording {
            Recording::On(tape) => tape,
            Recording::Outside | Recording::NoGrad => Self::default(),
        };
        Ok((result?, tape))
    }

    /// The state of this thread.
    pub(super) fn mode() -> Mode {
        RECORDING.with_borrow(|recording| match recording {
            Recording::Outside => Mode::Outside,
            Recording::NoGrad => Mode::NoGrad,
            Recording::On(_) => Mode::Recording,
        })
    }

    /// Adds an operation to the tape of this thread. Returns its result as a variable.
    pub(super) fn push<const N: usize, F>(
        operands: [&Tensor; N],
        result: OpResult,
        backward: F,
    ) -> Result<Tensor>
    where
        F: FnOnce([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]>,
        F: Send + Sync + 'static,
    {
        let result = result.into_variable()?;
        let (operands, value) = (operands.map(Tensor::clone), result.detach());
        let backward = move |grad: &Tensor| {
            let gradients = backward(operands.each_ref(), &value, grad)?;
            let pairs = operands.into_iter().zip(gradients);
            Ok(pairs
                .filter_map(|(operand, gradient)| Some((operand, gradient?)))
                .collect())
        };
        let entry = Entry {
            result: result.clone(),
            backward: Box::new(backward),
        };
        RECORDING.with_borrow_mut(|recording| {
            if let Recording::On(tape) = recording {
                tape.0.push(entry);
            }
        });
        Ok(result)
    }

    /// Adds the gradients of the variables that `output` depends on to those of the running backward pass, given the gradient of
    /// `output`. Each operation is dropped, with the tensors it holds, after its own backward.
    pub(super) fn backward(mut self, output: &Tensor, grad: Tensor) -> Result<()> {
        propagate(output, grad)?;
        while let Some(Entry { result, backward }) = self.0.pop() {
            let Some(grad) = take_gradient(&result)? else {
                continue;
            };
            drop(result);
            for (operand, gradient) in backward(&grad)? {
                propagate(&operand, gradient)?;
            }
        }
        Ok(())
    }
}
