//! Gradients of a scalar with respect to variables.

use std::cell::RefCell;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::in_pool;
use super::tape::Tape;

thread_local! {
    /// The gradients that the backward pass of this thread has found.
    static VARIABLE_GRADS: RefCell<Option<GradStore>> = const { RefCell::new(None) };
}

/// The gradients of the scalar that `pass` computes with respect to every variable that it depends on, each of the variable's
/// shape and dtype; and what `pass` returns besides.
///
/// The numbers of [`Tensor::backward`], with less traffic: candle adds every gradient to a tensor of zeros first.
///
/// # Errors
/// When `pass` or an operation's backward fails.
pub fn gradients<R>(pass: impl FnOnce() -> Result<(Tensor, R)>) -> Result<(GradStore, R)> {
    let ((scalar, rest), tape) = Tape::record(pass)?;
    let backward = || tape.backward(&scalar, scalar.ones_like()?);
    let ((), gradients) = in_pool(scalar.device(), || collect_variable_grads(backward))?;
    Ok((gradients, rest))
}

/// Runs a backward pass, and returns the gradients of variables that it accumulated.
pub(super) fn collect_variable_grads<R>(
    pass: impl FnOnce() -> Result<R>,
) -> Result<(R, GradStore)> {
    let outer = VARIABLE_GRADS.replace(Some(GradStore::default()));
    let result = pass();
    let accumulated = VARIABLE_GRADS.replace(outer);
    Ok((result?, accumulated.unwrap_or_default()))
}

/// Adds `gradient` to the running pass's gradient of `operand`; through candle's operations to the gradients of the variables
/// that `operand` depends on.
pub(super) fn propagate(operand: &Tensor, gradient: Tensor) -> Result<()> {
    if !operand.is_variable() {
        return accumulate_all(operand.apply_op1(Seed(gradient))?.backward()?);
    }
    with_running(|gradients| {
        let sum = match gradients.remove(operand) {
            Some(before) => before.add(&gradient)?,
            None => gradient,
        };
        gradients.insert(operand, sum.detach());
        Ok(())
    })
}

/// Takes the gradient of a variable from the running pass.
pub(super) fn take_gradient(variable: &Tensor) -> Result<Option<Tensor>> {
    // candle's gradients may carry a graph.
    with_running(|gradients| Ok(gradients.remove(variable).map(|gradient| gradient.detach())))
}

/// Adds the gradients that an inner pass found to those of the running one.
pub(super) fn accumulate_all(inner: GradStore) -> Result<()> {
    with_running(|gradients| gradients.extend(inner))
}

fn with_running<R>(work: impl FnOnce(&mut GradStore) -> Result<R>) -> Result<R> {
    VARIABLE_GRADS.with_borrow_mut(|running| match running {
        Some(gradients) => work(gradients),
        None => bail!("a gradient outside a backward pass"),
    })
}

/// A scalar, 0, whose gradient with respect to the operand is the given tensor: the start of a backward pass.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((x.device().zeros_impl(&scalar, x.dtype())?, scalar))
    }

    fn cuda_fwd(&self, x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let scalar = Shape::from(());
        Ok((x.device().zeros_impl(&scalar, x.dtype())?, scalar))
    }

    fn bwd(&self, _x: &Tensor, _res: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
