//! AdamW over named variables, with clipping by global norm.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Result, Tensor, Var};

use super::student::{Variables, detached};
use crate::config;
use crate::ops::{self, AdamWStep};

/// Gradients by variable name.
pub(super) type Gradients = BTreeMap<String, Tensor>;

/// `torch.optim.AdamW` and `torch.nn.utils.clip_grad_norm_`; state in f32.
#[derive(Debug)]
pub(super) struct AdamW {
    settings: config::Optimizer,
    first: Variables,
    second: Variables,
    steps: u64,
}

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";

impl AdamW {
    pub(super) fn new(settings: &config::Optimizer, variables: &Variables) -> Result<Self> {
        let zeros = || -> Result<Variables> {
            let zero = |var: &Var| Var::zeros(var.shape(), var.dtype(), var.device());
            variables
                .iter()
                .map(|(name, var)| Ok((name.clone(), zero(var)?)))
                .collect()
        };
        Ok(Self {
            settings: settings.clone(),
            first: zeros()?,
            second: zeros()?,
            steps: 0,
        })
    }

    /// The global norm of the gradients.
    pub(super) fn norm(gradients: &Gradients) -> Result<f64> {
        ops::in_pool(|| {
            let squares = gradients.values().map(ops::squared_norm);
            Ok(squares.sum::<Result<f64>>()?.sqrt())
        })
    }

    /// One step. `norm` is the gradients' global norm; above `max_grad_norm` they are scaled down to it.
    pub(super) fn step(
        &mut self,
        variables: &Variables,
        gradients: &Gradients,
        norm: f64,
        rate: f64,
    ) -> Result<()> {
        self.steps += 1;
        let Self { settings, .. } = self;
        let scale = (settings.max_grad_norm / (norm + 1e-6)).min(1.0);
        let step = AdamWStep {
            learning_rate: rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            weight_decay: settings.weight_decay,
            step: self.steps,
        };
        let moments = self.first.values().zip(self.second.values());
        let updates = variables.iter().zip(moments);
        ops::in_pool(|| {
            for ((name, var), (m, v)) in updates {
                if let Some(gradient) = gradients.get(name) {
                    ops::adamw_step(var, m, v, gradient, scale, &step)?;
                }
            }
            Ok(())
        })
    }

    /// Both moments of every variable, which go on changing with every step.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, moments: &Variables| {
            let tensors = detached(moments).into_iter();
            tensors
                .map(move |(name, t)| (format!("{prefix}{name}"), t))
                .collect::<Vec<_>>()
        };
        [named(FIRST, &self.first), named(SECOND, &self.second)].concat()
    }

    /// Takes up the state that [`Self::state`] gave after `steps` steps; the name of the first tensor that is missing, if one is.
    pub(super) fn restore(
        &mut self,
        saved: &HashMap<String, Tensor>,
        steps: u64,
    ) -> Result<Option<String>> {
        for (prefix, moments) in [(FIRST, &self.first), (SECOND, &self.second)] {
            for (name, var) in moments {
                let name = format!("{prefix}{name}");
                match saved.get(&name) {
                    Some(tensor) => var.set(tensor)?,
                    None => return Ok(Some(name)),
                }
            }
        }
        self.steps = steps;
        Ok(None)
    }
}
