//! AdamW over named variables, with clipping by global norm.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Result, Tensor, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::loss_scale::LossScale;
use super::student::Variables;
use crate::config::{self, OptimizerKind};
use crate::ops::{self, AdamWStep, BlockMoments, BlockQuantized};

/// Gradients by variable name.
pub(super) type Gradients = BTreeMap<String, Tensor>;

/// Variables with fewer elements keep their moments in `f32`, as in bitsandbytes.
const SMALLEST_QUANTIZED: usize = 4096;

/// `torch.optim.AdamW` or bitsandbytes' `AdamW8bit`, `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler`.
#[derive(Debug)]
pub(super) struct AdamW {
    settings: config::Optimizer,
    moments: BTreeMap<String, Moments>,
    numbers: Numbers,
}

/// What a checkpoint keeps of an optimiser besides tensors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Numbers {
    /// Steps made; those that overflowed are not among them.
    steps: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    loss_scale: Option<LossScale>,
}

/// The averages of a variable's gradient and of its square.
#[derive(Debug)]
enum Moments {
    Full { first: Var, second: Var },
    Blocks(BlockMoments),
}

const FIRST: &str = "exp_avg.";
const SECOND: &str = "exp_avg_sq.";
/// The scales of moments in 8 bits.
const FIRST_ABSMAX: &str = "exp_avg_absmax.";
const SECOND_ABSMAX: &str = "exp_avg_sq_absmax.";

impl AdamW {
    /// An optimiser before its first step; `scaled` gives it a loss scale.
    pub(super) fn new(
        settings: &config::Optimizer,
        variables: &Variables,
        scaled: bool,
    ) -> Result<Self> {
        let moments = |var: &Var| -> Result<Moments> {
            let (n, device) = (var.elem_count(), var.device());
            if settings.kind == OptimizerKind::AdamW8bit && n >= SMALLEST_QUANTIZED {
                return BlockMoments::zeros(n, device).map(Moments::Blocks);
            }
            let zeros = || Var::zeros(var.shape(), DType::F32, device);
            Ok(Moments::Full {
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
            numbers: Numbers {
                steps: 0,
                loss_scale: scaled.then(LossScale::new),
            },
        })
    }

    /// Steps made.
    pub(super) fn steps(&self) -> u64 {
        self.numbers.steps
    }

    /// The loss scale, if the loss is scaled.
    pub(super) fn loss_scale(&self) -> Option<LossScale> {
        self.numbers.loss_scale
    }

    /// What the loss was multiplied by for the gradients.
    fn factor(&self) -> f64 {
        self.loss_scale().map_or(1.0, LossScale::factor)
    }

    /// The global norm of the loss's gradients, given those of the scaled loss.
    pub(super) fn norm(&self, gradients: &Gradients) -> Result<f64> {
        let gradients: Vec<&Tensor> = gradients.values().collect();
        let squares = gradients.into_par_iter().map(ops::squared_norm);
        // Collected before it is summed: the order of the sum must not depend on the threads.
        let squares: Vec<f64> = squares.collect::<Result<_>>()?;
        Ok(squares.iter().sum::<f64>().sqrt() / self.factor())
    }

    /// One step with the gradients of the scaled loss. `norm` is the global norm of the loss's; above `max_grad_norm` they are
    /// scaled down to it. Where the loss is scaled and the norm not finite, nothing is changed but the scale.
    pub(super) fn step(
        &mut self,
        variables: &Variables,
        gradients: &Gradients,
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
        let updates: Vec<_> = variables.iter().zip(self.moments.values_mut()).collect();
        // All tensors at once: most are too small for every core.
        updates
            .into_par_iter()
            .try_for_each(|((name, var), moments)| {
                let Some(gradient) = gradients.get(name) else {
                    return Ok(());
                };
                match moments {
                    Moments::Full { first, second } => {
                        ops::adamw_step(var, first, second, gradient, scale, &step)
                    }
                    Moments::Blocks(moments) => {
                        ops::adamw8bit_step(var, moments, gradient, scale, &step)
                    }
                }
            })
    }

    /// What there is besides [`Self::state`].
    pub(super) fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Both moments of every variable, by the names of PyTorch's state. Those of the next step replace them or are
    /// written over them.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        for (name, moments) in &self.moments {
            let mut add = |prefix: &str, t: Tensor| state.push((format!("{prefix}{name}"), t));
            match moments {
                Moments::Full { first, second } => {
                    add(FIRST, first.as_detached_tensor());
                    add(SECOND, second.as_detached_tensor());
                }
                Moments::Blocks(BlockMoments { first, second }) => {
                    add(FIRST, first.codes.clone());
                    add(FIRST_ABSMAX, first.absmax.clone());
                    add(SECOND, second.codes.clone());
                    add(SECOND_ABSMAX, second.absmax.clone());
                }
            }
        }
        state
    }

    /// Takes up the state that [`Self::state`] and [`Self::numbers`] gave; what is wrong with it, if it does not fit.
    pub(super) fn restore(
        &mut self,
        saved: &HashMap<String, Tensor>,
        numbers: Numbers,
    ) -> Result<Option<String>> {
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
                Moments::Full { first, second } => {
                    first.set(&part(FIRST)?)?;
                    second.set(&part(SECOND)?)?;
                }
                Moments::Blocks(BlockMoments { first, second }) => {
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
    fn parts() -> Result<(Variables, Gradients, AdamW)> {
        let sizes = [("large", SMALLEST_QUANTIZED), ("small", 3)];
        let (mut variables, mut gradients) = (Variables::new(), Gradients::new());
        for (name, n) in sizes {
            let var = Var::ones(n, DType::F32, &Device::Cpu)?;
            variables.insert(name.to_owned(), var);
            let gradient = Tensor::full(2f32, n, &Device::Cpu)?;
            gradients.insert(name.to_owned(), gradient);
        }
        let settings = config::Optimizer {
            kind: OptimizerKind::AdamW8bit,
            learning_rate: 0.1,
            ..config::Optimizer::default()
        };
        let optimizer = AdamW::new(&settings, &variables, true)?;
        Ok((variables, gradients, optimizer))
    }

    fn values(variables: &Variables) -> Result<Vec<Vec<f32>>> {
        variables.values().map(|v| v.to_vec1::<f32>()).collect()
    }

    #[test]
    fn an_overflow_changes_nothing_but_the_scale() -> Result<()> {
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
    fn gradients_of_the_scaled_loss_are_scaled_back() -> Result<()> {
        let (_, gradients, optimizer) = parts()?;
        let elements = (SMALLEST_QUANTIZED + 3) as f64;
        let want = 2.0 * elements.sqrt() / optimizer.factor();
        assert!((optimizer.norm(&gradients)? / want - 1.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn a_restored_optimizer_makes_the_same_steps() -> Result<()> {
        let (variables, gradients, mut first) = parts()?;
        first.step(&variables, &gradients, first.norm(&gradients)?, 0.1)?;
        let (again, _, mut second) = parts()?;
        for (name, var) in &again {
            var.set(variables[name].as_tensor())?;
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
