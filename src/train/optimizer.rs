//! AdamW over named variables, with clipping by global norm.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::loss_scale::LossScale;
use crate::config::{self, OptimizerKind};
use crate::ops::{self, AdamWMoments, AdamWStep, AdamWUpdate, BlockMoments, BlockQuantized};
use crate::params::{Grads, ParamSet, Tensors};
use crate::ranks::{Collective, ExchangeError, Outgoing, Patience, Rank, Shares, TensorForm};

/// Variables with fewer elements keep their moments in `f32`, as in bitsandbytes.
const SMALLEST_QUANTIZED: usize = 4096;

/// `torch.optim.AdamW` or bitsandbytes' `AdamW8bit`, `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler`.
///
/// Of several ranks each holds the moments of its own variables and updates these alone.
#[derive(Debug)]
pub struct AdamW {
    settings: config::Optimizer,
    shares: Shares,
    /// The moments of this rank's own variables.
    moments: BTreeMap<String, AdamWMoments>,
    /// On rank 0 between [`Self::gather_moments`] and [`Self::release_moments`] those of all others, by the names of their tensors.
    gathered: BTreeMap<String, Tensor>,
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
    /// An optimiser of `rank` before its first step; with `scaled` it has a loss scale.
    ///
    /// # Errors
    /// When the moments can't be allocated.
    pub fn new(
        settings: &config::Optimizer,
        variables: &ParamSet,
        scaled: bool,
        rank: Rank,
    ) -> Result<Self> {
        let sizes = variables.iter();
        let shares = Shares::new(
            rank,
            sizes.map(|(name, var)| (name.as_str(), var.elem_count())),
        );
        let own = variables.iter().filter(|(name, _)| shares.owns(name));
        let moments = own.map(|(name, var)| Ok((name.clone(), zero_moments(settings.kind, var)?)));
        Ok(Self {
            settings: settings.clone(),
            moments: moments.collect::<Result<_>>()?,
            shares,
            gathered: BTreeMap::new(),
            numbers: OptimizerState {
                steps: 0,
                loss_scale: scaled.then(LossScale::new),
            },
        })
    }

    /// Which rank updates which variable.
    pub fn shares(&self) -> &Shares {
        &self.shares
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

    /// Global norm of the gradients of the loss, from the sum of the squares of those of the scaled loss.
    pub fn norm(&self, squares: f64) -> f64 {
        squares.sqrt() / self.factor()
    }

    /// One step of this rank's own variables with the gradients of the scaled loss. `norm` is the global norm of the loss's gradients; above `max_grad_norm`
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
        let own = variables.iter().filter(|(name, _)| self.shares.owns(name));
        for ((name, param), moments) in own.zip(self.moments.values_mut()) {
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

    /// Both moments of every variable of this rank, and of those that are gathered, by the names of PyTorch's state. The tensors may
    /// share storage that the next step overwrites.
    pub fn state(&self) -> Tensors {
        let own = self.moments.iter();
        let mut state = self.gathered.clone();
        state.extend(own.flat_map(|(name, moments)| tensors_of(name, moments)));
        state
    }

    /// Gathers the moments of all ranks on rank 0. Every rank calls it.
    ///
    /// # Errors
    /// When a rank does not answer, or a tensor operation fails.
    pub fn gather_moments(
        &mut self,
        collective: &dyn Collective,
        variables: &ParamSet,
        patience: Patience,
    ) -> std::result::Result<(), ExchangeError> {
        let rank = collective.rank();
        let variables: BTreeMap<&String, &Var> = variables.iter().collect();
        for round in self.shares.rounds() {
            if rank.world == 1 {
                break;
            }
            let mut sent = vec![Vec::new(); rank.world];
            let mut names = Vec::new();
            let mut expected = vec![Vec::new(); rank.world];
            if rank.leads() {
                for (owned, expected) in round.iter().zip(&mut expected).skip(1) {
                    for name in owned {
                        let like = zero_moments(self.settings.kind, variables[name])?;
                        for (name, tensor) in tensors_of(name, &like) {
                            names.push(name);
                            // In main memory: the device has room for this rank's part alone.
                            expected.push(TensorForm {
                                device: Device::Cpu,
                                ..TensorForm::of(&tensor)
                            });
                        }
                    }
                }
            } else {
                let own = round[rank.index].iter();
                let own = own.flat_map(|name| tensors_of(name, &self.moments[name]));
                let in_main_memory = own.map(|(_, tensor)| tensor.to_device(&Device::Cpu));
                sent[0] = in_main_memory.collect::<Result<_>>()?;
            }
            let received = collective.exchange(Outgoing::Rows(sent), &expected, patience)?;
            self.gathered
                .extend(names.into_iter().zip(received.into_iter().flatten()));
        }
        Ok(())
    }

    /// Drops what [`Self::gather_moments`] gathered.
    pub fn release_moments(&mut self) {
        self.gathered.clear();
    }

    /// Restores this rank's part of what [`Self::state`] and [`Self::numbers`] gave. Returns what is wrong with it if it does not fit.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn restore(&mut self, saved: &Tensors, numbers: OptimizerState) -> Result<Option<String>> {
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

/// The moments of a variable before the first step.
fn zero_moments(kind: OptimizerKind, var: &Var) -> Result<AdamWMoments> {
    let (n, device) = (var.elem_count(), var.device());
    if kind == OptimizerKind::AdamW8bit && n >= SMALLEST_QUANTIZED {
        return BlockMoments::zeros(n, device).map(AdamWMoments::Blocks);
    }
    let zeros = || Var::zeros(var.shape(), DType::F32, device);
    Ok(AdamWMoments::Full {
        first: zeros()?,
        second: zeros()?,
    })
}

/// The tensors of a variable's moments, by their names in a checkpoint.
fn tensors_of(name: &str, moments: &AdamWMoments) -> Vec<(String, Tensor)> {
    let named = |prefix: &str, tensor| (format!("{prefix}{name}"), tensor);
    match moments {
        AdamWMoments::Full { first, second } => vec![
            named(FIRST, first.as_detached_tensor()),
            named(SECOND, second.as_detached_tensor()),
        ],
        AdamWMoments::Blocks(BlockMoments { first, second }) => vec![
            named(FIRST, first.codes.clone()),
            named(FIRST_ABSMAX, first.absmax.clone()),
            named(SECOND, second.codes.clone()),
            named(SECOND_ABSMAX, second.absmax.clone()),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::threads::on_ranks;

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
        let optimizer = AdamW::new(&settings, &variables, true, Rank::SOLO)?;
        Ok((variables, gradients, optimizer))
    }

    fn norm(optimizer: &AdamW, gradients: &Grads) -> Result<f64> {
        let gradients: Vec<&Tensor> = gradients.values().collect();
        let squares = ops::squared_norms(&gradients)?;
        Ok(optimizer.norm(squares.into_iter().sum()))
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
        let norm = norm(&optimizer, &gradients)?;
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
        assert!((norm(&optimizer, &gradients)? / want - 1.0).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn adamw_restored_makes_the_same_steps() -> Result<()> {
        let (variables, gradients, mut first) = parts()?;
        let before = norm(&first, &gradients)?;
        first.step(&variables, &gradients, before, 0.1)?;
        let (again, _, mut second) = parts()?;
        for ((_, var), (_, trained)) in again.iter().zip(variables.iter()) {
            var.set(trained.as_tensor())?;
        }
        let mut saved = Tensors::new();
        for (name, tensor) in first.state() {
            saved.insert(name, tensor.copy()?);
        }
        assert_eq!(second.restore(&saved, first.numbers())?, None);
        for (optimizer, variables) in [(&mut first, &variables), (&mut second, &again)] {
            let norm = norm(optimizer, &gradients)?;
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

    #[test]
    fn adamw_of_several_ranks_leaves_the_state_of_one() {
        let patience = Patience::ForData(std::time::Duration::from_secs(60));
        let settings = config::Optimizer {
            kind: OptimizerKind::AdamW8bit,
            ..config::Optimizer::default()
        };
        let states = |world: usize| {
            let mut states = on_ranks(world, |collective| -> Result<_> {
                let (variables, gradients, _) = parts()?;
                let rank = collective.rank();
                let mut optimizer = AdamW::new(&settings, &variables, false, rank)?;
                let held = optimizer.state().len();
                optimizer.step(&variables, &gradients, 1.0, 0.1)?;
                optimizer
                    .gather_moments(&collective, &variables, patience)
                    .unwrap();
                let state = optimizer.state().into_iter();
                let wide = |(name, tensor): (String, Tensor)| -> Result<_> {
                    let numbers = tensor.to_dtype(DType::F64)?.flatten_all()?;
                    Ok((name, tensor.dtype(), numbers.to_vec1::<f64>()?))
                };
                let state = state.map(wide).collect::<Result<Vec<_>>>()?;
                optimizer.release_moments();
                assert_eq!(optimizer.state().len(), held);
                Ok((held, state))
            });
            states.remove(0).unwrap()
        };
        let ((all, one), (part, two)) = (states(1), states(2));
        assert_eq!(one, two);
        assert!(part < all, "{part} of {all}");
    }
}
