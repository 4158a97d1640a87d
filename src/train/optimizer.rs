//! AdamW over named variables, with clipping by global norm.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor, Var};

use super::student::{Variables, detached};
use super::{TrainError, io};
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

    /// Writes both moments of every variable.
    pub(super) fn save(&self, path: &Path) -> std::result::Result<(), TrainError> {
        let named = |prefix: &'static str, moments: &Variables| {
            let tensors = detached(moments).into_iter();
            tensors
                .map(move |(name, t)| (format!("{prefix}{name}"), t))
                .collect::<Vec<_>>()
        };
        let tensors = [named(FIRST, &self.first), named(SECOND, &self.second)].concat();
        safetensors::serialize_to_file(tensors, None, path)
            .map_err(|e| io(path)(std::io::Error::other(e)))
    }

    /// Reads what [`Self::save`] wrote; `steps` is the number of steps made by then.
    pub(super) fn load(
        &mut self,
        path: &Path,
        steps: u64,
        device: &Device,
    ) -> std::result::Result<(), TrainError> {
        let saved = candle_core::safetensors::load(path, device)?;
        for (prefix, moments) in [(FIRST, &self.first), (SECOND, &self.second)] {
            for (name, var) in moments {
                let name = format!("{prefix}{name}");
                let tensor = saved.get(&name).ok_or_else(|| TrainError::Checkpoint {
                    path: path.to_owned(),
                    message: format!("tensor \"{name}\" is missing"),
                })?;
                var.set(tensor)?;
            }
        }
        self.steps = steps;
        Ok(())
    }
}
