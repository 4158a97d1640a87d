//! Trained variables by name, and their gradients.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var, bail};

use crate::ops::{self, EmaUpdate};

/// Tensors by name, in name order.
pub type Tensors = BTreeMap<String, Tensor>;
/// Gradients by the name of their variable, in name order.
pub type Grads = Tensors;

/// Trained variables by name: a whole network, or the matrices of adapters. Always in name order, so that no result depends on
/// hashing.
///
/// Some may have a copy in the type that the network computes in. The network is then built over the copy, instead of casting
/// the variable wherever it is used; every update of the variable refreshes it.
#[derive(Debug)]
pub struct ParamSet {
    variables: BTreeMap<String, Var>,
    copies: BTreeMap<String, Var>,
}

impl ParamSet {
    /// Variables that start as copies of `tensors`.
    ///
    /// # Errors
    /// When a tensor can't be copied.
    pub fn new(tensors: &Tensors) -> Result<Self> {
        let variables = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(tensor)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            variables,
            copies: BTreeMap::new(),
        })
    }

    /// The same variables, with a copy as `dtype` of each whose name is `computed_with` in that type.
    ///
    /// # Errors
    /// When a variable can't be cast.
    pub fn with_copies(self, dtype: DType, computed_with: impl Fn(&str) -> bool) -> Result<Self> {
        let Self { variables, .. } = self;
        let copied = variables
            .iter()
            .filter(|(name, var)| computed_with(name) && var.dtype() != dtype);
        let copies = copied
            .map(|(name, var)| {
                let copy = ops::cast(&var.as_detached_tensor(), dtype)?;
                Ok((name.clone(), Var::from_tensor(&copy)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { variables, copies })
    }

    /// Variables with their names, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Var)> {
        self.variables.iter()
    }

    /// The copy of a variable, which every update of it has to refresh.
    pub fn copy_of(&self, name: &str) -> Option<&Var> {
        self.copies.get(name)
    }

    /// Gives a variable, and its copy, a new value.
    ///
    /// # Errors
    /// When there is no variable of this name, or the value has another shape or type.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<()> {
        let Some(var) = self.variables.get(name) else {
            bail!("there is no variable {name}");
        };
        var.set(value)?;
        match self.copy_of(name) {
            Some(copy) => copy.set(&ops::cast(value, copy.dtype())?),
            None => Ok(()),
        }
    }

    /// The tensors that a network computes with, as leaves of a graph: it records gradients.
    pub fn tracked(&self) -> Tensors {
        self.computed_with(|var| var.as_tensor().clone())
    }

    /// The storage of the tensors that a network computes with, outside any graph: it sees every update and records nothing.
    pub fn detached(&self) -> Tensors {
        self.computed_with(|var| var.as_detached_tensor())
    }

    /// The variables' own storage, outside any graph.
    pub fn values(&self) -> Tensors {
        let tensors = self.iter();
        tensors
            .map(|(name, var)| (name.clone(), var.as_detached_tensor()))
            .collect()
    }

    /// A variable's copy, or the variable if it has none.
    fn leaf<'a>(&'a self, name: &str, var: &'a Var) -> &'a Var {
        self.copy_of(name).unwrap_or(var)
    }

    fn computed_with(&self, tensor: impl Fn(&Var) -> Tensor) -> Tensors {
        let leaf = |(name, var)| (String::clone(name), tensor(self.leaf(name, var)));
        self.iter().map(leaf).collect()
    }

    /// Adds the gradients of these variables in `found` to `sums`.
    ///
    /// A sum is of the variable's type. A gradient in 16 bits that is the only one stays as it is on a GPU, whose optimiser
    /// reads it.
    ///
    /// # Errors
    /// When two gradients of one variable can't be added.
    pub fn accumulate(&self, sums: &mut Grads, mut found: GradStore) -> Result<()> {
        for (name, var) in self.iter() {
            let Some(gradient) = found.remove(self.leaf(name, var)) else {
                continue;
            };
            let widened = |gradient: &Tensor| ops::cast(gradient, var.dtype());
            let sum = match sums.remove(name) {
                Some(earlier) => widened(&earlier)?.add(&widened(&gradient)?)?,
                None if gradient.device().is_cuda() => gradient,
                None => widened(&gradient)?,
            };
            sums.insert(name.clone(), sum);
        }
        Ok(())
    }

    /// The sums of two sets of gradients of these variables, of the variables' types.
    ///
    /// # Errors
    /// When two gradients of one variable can't be added.
    pub fn add(&self, mut earlier: Grads, mut later: Grads) -> Result<Grads> {
        let mut sums = Grads::new();
        for (name, var) in self.iter() {
            let sum = match (earlier.remove(name), later.remove(name)) {
                (Some(a), Some(b)) => {
                    ops::cast(&a, var.dtype())?.add(&ops::cast(&b, var.dtype())?)?
                }
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => continue,
            };
            sums.insert(name.clone(), sum);
        }
        Ok(sums)
    }

    /// Names of the variables that have no gradient in `gradients`.
    pub fn without_gradient(&self, gradients: &Grads) -> Vec<&str> {
        let names = self.variables.keys();
        let missing = names.filter(|name| !gradients.contains_key(*name));
        missing.map(String::as_str).collect()
    }

    /// Moves these variables towards those of `source`, a set of the same names: `own = decay·own + (1 - decay)·source`. As the
    /// reference's `update_ema`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn follow(&self, source: &Self, decay: f64) -> Result<()> {
        let pairs = self.iter().zip(source.variables.values());
        let updates: Vec<EmaUpdate<'_>> = pairs
            .map(|((_, target), source)| EmaUpdate { target, source })
            .collect();
        ops::ema_updates(&updates, decay)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::{AdamWMoments, AdamWStep, AdamWUpdate};

    fn tensors(a: &[f32], b: &[f32]) -> Result<Tensors> {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        Ok([("a".to_owned(), tensor(a)?), ("b".to_owned(), tensor(b)?)].into())
    }

    #[test]
    fn param_set_follows_another() -> Result<()> {
        let target = ParamSet::new(&tensors(&[0.0, 1.0], &[2.0])?)?;
        let source = ParamSet::new(&tensors(&[8.0, 3.0], &[0.0])?)?;
        target.follow(&source, 0.75)?;
        assert_eq!(target.values()["a"].to_vec1::<f32>()?, [2.0, 1.5]);
        assert_eq!(target.values()["b"].to_vec1::<f32>()?, [1.5]);
        Ok(())
    }

    #[test]
    fn param_set_copies_follow_their_variables() -> Result<()> {
        let params = ParamSet::new(&tensors(&[0.1, 1.0], &[2.0])?)?;
        let params = params.with_copies(DType::F16, |name| name == "a")?;
        let types = |tensors: Tensors| tensors.values().map(Tensor::dtype).collect::<Vec<_>>();
        assert_eq!(types(params.values()), [DType::F32; 2]);
        assert_eq!(types(params.detached()), [DType::F16, DType::F32]);
        let before = params.values()["a"].to_vec1::<f32>()?;
        let moment = || Var::zeros(2, DType::F32, &Device::Cpu);
        let update = AdamWUpdate {
            param: &params.variables["a"],
            moments: &mut AdamWMoments::Full {
                first: moment()?,
                second: moment()?,
            },
            grad: &Tensor::new(&[1f32, -1.0], &Device::Cpu)?,
            copy: params.copy_of("a"),
        };
        let step = AdamWStep {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 1,
        };
        ops::adamw_steps(&mut [update], 1.0, &step)?;
        let after = params.values()["a"].clone();
        assert_ne!(after.to_vec1::<f32>()?, before);
        let wide = |x: &Tensor| x.to_dtype(DType::F32)?.to_vec1::<f32>();
        let rounded = after.to_dtype(DType::F16)?;
        assert_eq!(wide(&params.tracked()["a"])?, wide(&rounded)?);
        // A value from elsewhere leaves the same as the update.
        let again = ParamSet::new(&tensors(&[0.0; 2], &[2.0])?)?;
        let again = again.with_copies(DType::F16, |name| name == "a")?;
        again.set("a", &after)?;
        assert_eq!(wide(&again.tracked()["a"])?, wide(&rounded)?);
        assert!(again.set("c", &after).is_err());
        Ok(())
    }

    #[test]
    fn param_set_sums_gradients_of_copies_in_the_type_of_the_variable() -> Result<()> {
        let params = ParamSet::new(&tensors(&[1.0, 2.0], &[3.0])?)?;
        let params = params.with_copies(DType::F16, |name| name == "a")?;
        let mut sums = Grads::new();
        // The second gradient is too small for a sum in f16.
        for factor in [1.0, 1.0 / 4096.0] {
            let leaves = params.tracked();
            let loss = || (&leaves["a"] * factor)?.sum_all()?.to_dtype(DType::F32);
            let (gradients, ()) = ops::gradients(|| Ok((loss()?, ())))?;
            params.accumulate(&mut sums, gradients)?;
            assert_eq!(params.without_gradient(&sums), ["b"]);
        }
        assert_eq!(sums["a"].to_vec1::<f32>()?, [1.0 + 1.0 / 4096.0; 2]);
        Ok(())
    }
}
