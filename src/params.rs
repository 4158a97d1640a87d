//! Trained variables by name, and their gradients.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use crate::ops::{self, EmaUpdate};

/// Tensors by name, in name order.
pub type Tensors = BTreeMap<String, Tensor>;
/// Gradients by the name of their variable, in name order.
pub type Grads = Tensors;

/// Trained variables by name: a whole network, or the matrices of adapters. Always in name order, so that no result depends on
/// hashing.
#[derive(Debug)]
pub struct ParamSet(BTreeMap<String, Var>);

impl ParamSet {
    /// Variables that start as copies of `tensors`.
    ///
    /// # Errors
    /// When a tensor can't be copied.
    pub fn new(tensors: &Tensors) -> Result<Self> {
        tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(tensor)?)))
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Variables with their names, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.0.iter()
    }

    /// The variables as leaves of a graph: a network over them records gradients.
    pub fn tracked(&self) -> Tensors {
        let tensors = self.iter();
        tensors
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
            .collect()
    }

    /// The variables' storage outside any graph: a network over it sees every update and records nothing.
    pub fn detached(&self) -> Tensors {
        let tensors = self.iter();
        tensors
            .map(|(name, var)| (name.clone(), var.as_detached_tensor()))
            .collect()
    }

    /// Adds the gradients of these variables in `found` to `sums`.
    ///
    /// # Errors
    /// When two gradients of one variable can't be added.
    pub fn accumulate(&self, sums: &mut Grads, mut found: GradStore) -> Result<()> {
        for (name, var) in &self.0 {
            let Some(gradient) = found.remove(var) else {
                continue;
            };
            let sum = match sums.remove(name) {
                Some(earlier) => earlier.add(&gradient)?,
                None => gradient,
            };
            sums.insert(name.clone(), sum);
        }
        Ok(())
    }

    /// Names of the variables that have no gradient in `gradients`.
    pub fn without_gradient(&self, gradients: &Grads) -> Vec<&str> {
        let missing = self.0.keys().filter(|name| !gradients.contains_key(*name));
        missing.map(String::as_str).collect()
    }

    /// Moves these variables towards those of `source`, a set of the same names: `own = decay·own + (1 - decay)·source`. As the
    /// reference's `update_ema`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn follow(&self, source: &Self, decay: f64) -> Result<()> {
        let pairs = self.0.values().zip(source.0.values());
        let updates: Vec<EmaUpdate<'_>> = pairs
            .map(|(target, source)| EmaUpdate {
                target,
                source,
                copy: None,
            })
            .collect();
        ops::ema_updates(&updates, decay)
    }
}
