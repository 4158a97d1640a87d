//! Gradients of a scalar with respect to variables.

use std::cell::RefCell;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::in_pool;

thread_local! {
    /// Gradients of variables, from this module's operations, while [`backward`] runs on this thread.
    static VARIABLE_GRADS: RefCell<Option<GradStore>> = const { RefCell::new(None) };
}

/// The gradients of `scalar` with respect to every variable that it depends on, each of the variable's shape and dtype.
///
/// The numbers of [`Tensor::backward`], with less traffic: candle adds each gradient to a tensor of zeros first, which
/// for a weight is several passes over it. Here the operations of this module hand over gradients of variables as they are.
///
/// # Errors
/// When an operation's backward fails.
pub fn backward(scalar: &Tensor) -> Result<GradStore> {
    in_pool(scalar.device(), || collect(scalar))
}

fn collect(scalar: &Tensor) -> Result<GradStore> {
    let (store, mut gradients) = collect_variable_grads(|| scalar.backward())?;
    // candle's own operations found the rest.
    gradients.extend(store)?;
    Ok(gradients)
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

/// Adds a gradient to the running [`backward`]'s if `operand` is a variable. Otherwise, and under candle's own backward,
/// returns it for candle to go on with.
pub(super) fn accumulate_variable_grad(
    operand: &Tensor,
    gradient: Option<Tensor>,
) -> Result<Option<Tensor>> {
    VARIABLE_GRADS.with_borrow_mut(|running| match (running, gradient) {
        (Some(gradients), Some(gradient)) if operand.is_variable() => {
            let sum = match gradients.remove(operand) {
                Some(before) => before.add(&gradient)?.detach(),
                None => gradient.detach(),
            };
            gradients.insert(operand, sum);
            Ok(None)
        }
        (_, gradient) => Ok(gradient),
    })
}

/// Adds `gradient` to the running pass's gradient of `operand`; through candle's operations to the gradients of the variables
/// that `operand` depends on.
pub(super) fn propagate(operand: &Tensor, gradient: Tensor) -> Result<()> {
    match accumulate_variable_grad(operand, Some(gradient))? {
        None => Ok(()),
        Some(gradient) => accumulate_all(operand.apply_op1(Seed(gradient))?.backward()?),
    }
}

/// Takes the gradient of a variable from the running pass.
pub(super) fn take_gradient(variable: &Tensor) -> Option<Tensor> {
    VARIABLE_GRADS.with_borrow_mut(|running| running.as_mut()?.remove(variable))
}

/// Adds the gradients that an inner pass found to those of the running one.
pub(super) fn accumulate_all(inner: GradStore) -> Result<()> {
    VARIABLE_GRADS.with_borrow_mut(|running| match running {
        Some(gradients) => gradients.extend(inner),
        None => {
            bail!("an activation checkpoint's gradients need ops::backward, not Tensor::backward")
        }
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
