//! Gradients of a scalar with respect to variables.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, bail};

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
    let outer = VARIABLE_GRADS.replace(Some(GradStore::default()));
    let store = scalar.backward();
    let accumulated = VARIABLE_GRADS.replace(outer);
    let mut gradients = accumulated.unwrap_or_default();
    // candle's own operations found the rest.
    gradients.extend(store?)?;
    Ok(gradients)
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
                Some(before) => before.add(&gradient)?,
                None => gradient,
            };
            gradients.insert(operand, sum);
            Ok(None)
        }
        (_, gradient) => Ok(gradient),
    })
}

/// Adds the gradients that an inner [`backward`] found to those of the running one.
pub(super) fn accumulate_all(inner: GradStore) -> Result<()> {
    VARIABLE_GRADS.with_borrow_mut(|running| match running {
        Some(gradients) => gradients.extend(inner),
        None => {
            bail!("an activation checkpoint's gradients need ops::backward, not Tensor::backward")
        }
    })
}
