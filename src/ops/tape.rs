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
    /// The tape of the pass that this thread records.
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// The tracked operations of a pass, in the order of their computation.
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
    /// Runs `pass` and records the tracked operations of this module that it computes on this thread.
    pub(super) fn record<R>(pass: impl FnOnce() -> Result<R>) -> Result<(R, Self)> {
        let outer = RECORDING.replace(Some(Self::default()));
        let result = pass();
        let tape = RECORDING.replace(outer).unwrap_or_default();
        Ok((result?, tape))
    }

    /// Runs `work` without recording it.
    pub(super) fn pause<R>(work: impl FnOnce() -> R) -> R {
        let outer = RECORDING.replace(None);
        let result = work();
        RECORDING.set(outer);
        result
    }

    /// Whether this thread records a pass.
    pub(super) fn is_recording() -> bool {
        RECORDING.with_borrow(Option::is_some)
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
        RECORDING.with_borrow_mut(|tape| {
            if let Some(tape) = tape {
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
            let Some(grad) = take_gradient(&result) else {
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
