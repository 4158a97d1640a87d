//! Gradients of a scalar with respect to variables.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId};

use super::pool::in_pool;

type ById = HashMap<TensorId, Tensor>;

thread_local! {
    /// Where the kernels put the gradients of variables while [`backward`] runs on this thread.
    static DELIVERED: RefCell<Option<ById>> = const { RefCell::new(None) };
}

/// Gradients by variable.
#[derive(Debug, Default)]
pub struct Gradients(ById);

impl Gradients {
    /// The gradient of a variable; none if the scalar does not depend on it.
    pub fn get(&self, variable: &Tensor) -> Option<&Tensor> {
        self.0.get(&variable.id())
    }

    /// Takes out the gradient of a variable.
    pub fn remove(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.remove(&variable.id())
    }
}

/// The gradients of `scalar` with respect to every variable it depends on.
///
/// The same numbers as [`Tensor::backward`], with less traffic: candle adds each gradient to a tensor of zeros first, which
/// for a weight is several passes over it; here the kernels hand over the gradients of variables as they are.
///
/// # Errors
/// When a tensor operation fails.
pub fn backward(scalar: &Tensor) -> Result<Gradients> {
    in_pool(|| collect(scalar))
}

fn collect(scalar: &Tensor) -> Result<Gradients> {
    let outer = DELIVERED.replace(Some(ById::new()));
    let store = scalar.backward();
    let delivered = DELIVERED.replace(outer);
    let (store, mut gradients) = (store?, delivered.unwrap_or_default());
    // What candle's own operations found, for variables they took part with.
    for &id in store.get_ids() {
        if let Some(gradient) = store.get_id(id) {
            add(&mut gradients, id, gradient.clone())?;
        }
    }
    Ok(Gradients(gradients))
}

/// Hands a gradient to the running [`backward`] if `operand` is a variable; otherwise, and under candle's own backward, gives
/// it back for candle to go on with.
pub(super) fn deliver(operand: &Tensor, gradient: Option<Tensor>) -> Result<Option<Tensor>> {
    DELIVERED.with_borrow_mut(|delivered| match (delivered, gradient) {
        (Some(gradients), Some(gradient)) if operand.is_variable() => {
            add(gradients, operand.id(), gradient).map(|()| None)
        }
        (_, gradient) => Ok(gradient),
    })
}

/// Hands on gradients that an inner [`backward`] found to the outer one.
pub(super) fn deliver_all(inner: Gradients) -> Result<()> {
    DELIVERED.with_borrow_mut(|delivered| {
        let Some(gradients) = delivered else {
            candle_core::bail!("a segment's gradients need ops::backward, not Tensor::backward");
        };
        for (id, gradient) in inner.0 {
            add(gradients, id, gradient)?;
        }
        Ok(())
    })
}

fn add(gradients: &mut ById, id: TensorId, gradient: Tensor) -> Result<()> {
    let sum = match gradients.remove(&id) {
        Some(before) => before.add(&gradient)?,
        None => gradient,
    };
    gradients.insert(id, sum);
    Ok(())
}
