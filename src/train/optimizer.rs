//! AdamW over named variables, with clipping by global norm.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::loss_scale::LossScale;
use crate::config::{self, OptimizerKind};
use crate::ops::{self, AdamWMoments, AdamWStep, AdamWUpdate, BlockMoments, BlockQuantized};
use crate::params::{Grads, ParamSet};

/// Variables with fewer elements keep their moments in `f32`, as in bitsandbytes.
const SMALLEST_QUANTIZED: usize = 4096;

/// `torch.optim.AdamW` or bitsandbytes' `AdamW8bit`, `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler`.
#[derive(Debug)]
pub struct AdamW {
    settings: config::Optimizer,
    moments: BTreeMap<String, AdamWMoments>,
    numbers: OptimizerState,
}

/// Numbers of an optimiser that a checkpoint holds besides tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerState {
    /// Steps made, without those that overflowed.
    steps: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    loss_scale: Option<LossScale>,
}

impl OptimizerState {
    /// Steps made, without those that overflowed.
    pub(super) fn steps(self) -> u64 {
        self.steps
    }

    /// Fault of the loss scale, where one `is_needed` or not.
    fn fault(self, is_needed: bool) -> Option<String> {
        match self.loss_scale {
            None if is_needed => Some("it has no loss scale, which fp16 needs".to_owned()),
            Some(_) if !is_needed => Some("it has a loss scale, which only fp16 has".to_owned()),
            Some(scale) if !scale.is_valid() => {
                let factor = scale.factor();
                Some(format!("its loss scale {factor} is not above 0"))
            }
            _ => None,
        }
    }
}

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";
/// Block scales of moments in 8 bits.
const FIRST_ABSMAX: &str = "exp_avg_absmax.";
const SECOND_ABSMAX: &str = "exp_avg_sq_absmax.";

impl AdamW {
    /// An optimiser before its first step; with `scaled` it has a loss scale.
    ///
    /// # Errors
    /// When the moments can't be allocated.
    pub fn new(settings: &config::Optimizer, variables: &ParamSet, scaled: bool) -> Result<Self> {
        let moments = |var: &Var| -> Result<AdamWMoments> {
            let (n, device) = (var.elem_count(), var.device());
            if settings.kind == OptimizerKind::AdamW8bit && n >= SMALLEST_QUANTIZED {
                return BlockMoments::zeros(n, device).map(AdamWMoments::Blocks);
            }
            let zeros = || Var::zeros(var.shape(), DType::F32, device);
            Ok(AdamWMoments::Full {
                first: zeros()?,
                second: zeros()?,
            })
        };
        Ok(Self {
            settings: settings.clone(),
            moments: variables
                .iter()
                .map(|(name, var)| Ok((name.clone(), moments(var)?)))
                .collect::<Result<_>>()?,
            numbers: OptimizerState {
                steps: 0,
                loss_scale: scaled.then(LossScale::new),
            },
        })
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.numbers.steps
    }

    /// Loss scale, if the loss is scaled.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.numbers.loss_scale
    }

    /// Factor of the loss that the gradients belong to.
    fn factor(&self) -> f64 {
        self.loss_scale().map_or(1.0, LossScale::factor)
    }

    /// Global norm of the gradients of the loss, from those of the scaled loss.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn norm(&self, gradients: &Grads) -> Result<f64> {
        let gradients: Vec<&Tensor> = gradients.values().collect();
        Ok(ops::global_squared_norm(&gradients)?.sqrt() / self.factor())
    }

    /// One step with the gradients of the scaled loss. `norm` is the global norm of the loss's gradients; above `max_grad_norm`
    /// the gradients are scaled down to it. If the loss is scaled and the norm is not finite, only the scale changes.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn step(
        &mut self,
        variables: &ParamSet,
        gradients: &Grads,
        norm: f64,
        rate: f64,
    ) -> Result<()> {
        let factor = self.factor();
        if let Some(scale) = &mut self.numbers.loss_scale {
            scale.update(norm.is_finite());
            if !norm.is_finite() {
                return Ok(());
            }
        }
        self.numbers.steps += 1;
        let Self { settings, .. } = self;
        let scale = (settings.max_grad_norm / (norm + 1e-6)).min(1.0) / factor;
        let step = AdamWStep {
            learning_rate: rate,
            beta1: settings.beta1,
            beta2: settings.beta2,
            epsilon: settings.epsilon,
            weight_decay: settings.weight_decay,
            step: self.numbers.steps,
        };
        let mut updates = Vec::with_capacity(self.moments.len());
        for ((name, param), moments) in variables.iter().zip(self.moments.values_mut()) {
            if let Some(grad) = gradients.get(name) {
                updates.push(AdamWUpdate {
                    param,
                    moments,
                    grad,
                    copy: variables.copy_of(name),
                });
            }
        }
        ops::adamw_steps(&mut updates, scale, &step)
    }

    /// The numbers besides [`Self::state`].
    pub fn numbers(&self) -> OptimizerState {
        self.numbers
    }

    /// Both moments of every variable, by the names of PyTorch's state. The tensors may share storage that the next step
    /// overwrites.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (name, moments) in &self.moments {
            let mut add = |prefix: &str, t: Tensor| state.push((format!("{prefix}{name}"), t));
            match moments {
                AdamWMoments::Full { first, second } => {
                    add(FIRST, first.as_detached_tensor());
                    add(SECOND, second.as_detached_tensor());
                }
                AdamWMoments::Blocks(BlockMoments { first, second }) => {
                    add(FIRST, first.codes.clone());
                    add(FIRST_ABSMAX, first.absmax.clone());
                    add(SECOND, second.codes.clone());
                    add(SECOND_ABSMAX, second.absmax.clone());
                }
            }
        }
        state
    }

    /// Restores what [`Self::state`] and [`Self::numbers`] gave. Returns what is wrong with it if it does not fit.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn restore(
        &mut self,
        saved: &HashMap<String, Tensor>,
        numbers: OptimizerState,
    ) -> Result<Option<String>> {
        if let Some(fault) = numbers.fault(self.numbers.loss_scale.is_some()) {
            return Ok(Some(fault));
        }
        for (name, like) in self.state() {
            match saved.get(&name) {
                None => return Ok(Some(format!("tensor \"{name}\" is missing"))),
                Some(t) if t.dtype() != like.dtype() || t.shape() != like.shape() => {
                    return Ok(Some(format!(
                        "tensor \"{name}\" is {:?} {:?}, not {:?} {:?}",
                        t.dtype(),
                        t.dims(),
                        like.dtype(),
                        like.dims()
                    )));
                }
                Some(_) => {}
            }
        }
        for (name, moments) in &mut self.moments {
            let part = |prefix: &str| {
                let part = saved.get(&format!("{prefix}{name}")).cloned();
                part.ok_or_else(|| candle_core::Error::Msg(format!("no {prefix}{name}")))
            };
            match moments {
                AdamWMoments::Full { first, second } => {
                    first.set(&part(FIRST)?)?;
                    second.set(&part(SECOND)?)?;
                }
                AdamWMoments::Blocks(BlockMoments { first, second }) => {
                    *first = BlockQuantized {
                        codes: part(FIRST)?,
                        absmax: part(FIRST_ABSMAX)?,
                    };
                    *second = BlockQuantized {
                        codes: part(SECOND)?,
                        absmax: part(SECOND_ABSMAX)?,
                    };
                }
            }
        }
        self.numbers = numbers;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// A variable large enough for 8 bits, a small one, their gradients, and an optimiser of both kinds of moments.
    fn parts() -> Result<(ParamSet, Grads, AdamW)> {
        let sizes = [("large", SMALLEST_QUANTIZED), ("small", 3)];
        let filled = |value: f32| -> Result<Grads> {
            let tensors = sizes.iter();
            tensors
                .map(|&(name, n)| Ok((name.to_owned(), Tensor::full(value, n, &Device::Cpu)?)))
                .collect()
        };
        let (variables, gradients) = (ParamSet::new(&filled(1.0)?)?, filled(2.0)?);
        let settings = config::Optimizer {
            kind: OptimizerKind::AdamW8bit,
            learning_rate: 0.1,
            ..config::Optimizer::default()
        };
        let optimizer = AdamW::new(&settings, &variables, true)?;
        Ok((variables, gradients, optimizer))
    }

    fn values(variables: &ParamSet) -> Result<Vec<Vec<f32>>> {
        variables.iter().map(|(_, v)| v.to_vec1::<f32>()).collect()
    }

    #[test]
    fn adamw_overflow_changes_the_scale_alone() -> Result<()> {
        let (variables, mut gradients, mut optimizer) = parts()?;
        let (before, scale) = (values(&variables)?, optimizer.factor());
        gradients.insert(
            "small".to_owned(),
            Tensor::full(f32::INFINITY, 3, &Device::Cpu)?,
        );
        let norm = optimizer.norm(&gradients)?;
        optimizer.step(&variables, &gradients, norm, 0.1)?;
        assert_eq!(values(&variables)?, before);
        assert_eq!((optimizer.steps(), optimizer.factor()), (0, scale / 2.0));
        Ok(())
    }

    #[test]
    fn adamw_norm_is_that_of_the_unscaled_loss() -> Result<()> {
        let (_, gradients, optimizer) = parts()?;
        let elements = (SMALLEST_QUANTIZED + 3) as f64;
        let want = 2.0 * elements.sqrt() / optimizer.factor();
        assert!((optimizer.norm(&gradients)? / want - 1.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn adamw_restored_makes_the_same_steps() -> Result<()> {
        let (variables, gradients, mut first) = parts()?;
        first.step(&variables, &gradients, first.norm(&gradients)?, 0.1)?;
        let (again, _, mut second) = parts()?;
        for ((_, var), (_, trained)) in again.iter().zip(variables.iter()) {
            var.set(trained.as_tensor())?;
        }
        let mut saved: HashMap<String, Tensor> = HashMap::new();
        for (name, tensor) in first.state() {
            saved.insert(name, tensor.copy()?);
        }
        assert_eq!(second.restore(&saved, first.numbers())?, None);
        for (optimizer, variables) in [(&mut first, &variables), (&mut second, &again)] {
            let norm = optimizer.norm(&gradients)?;
            optimizer.step(variables, &gradients, norm, 0.1)?;
        }
        assert_eq!(values(&variables)?, values(&again)?);
        assert_eq!(first.numbers(), second.numbers());
        saved.remove("exp_avg_absmax.large");
        let wrong = second.restore(&saved, first.numbers())?;
        assert_eq!(
            wrong.as_deref(),
            Some("tensor \"exp_avg_absmax.large\" is missing")
        );
        Ok(())
    }
}
