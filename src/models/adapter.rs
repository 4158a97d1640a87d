//! Low-rank adapters of a network's layers: PEFT's `peft.tuners.lora.layer`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use candle_core::{Result, Shape, Tensor};
use candle_nn::VarBuilder;

use crate::ops;

/// A low-rank adapter of one linear layer or convolution: `y = W·x + scale·up·(down·dropout(x))`.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// PEFT's A: `[rank, in]` of a linear layer; `[rank, in, k, k]` of a convolution, whose stride and padding it takes.
    pub down: Tensor,
    /// PEFT's B: `[out, rank]` of a linear layer; `[out, rank, 1, 1]` of a convolution.
    pub up: Tensor,
    /// Factor of the adapter's output: alpha divided by the rank.
    pub scale: f64,
    /// Dropout of the adapter's input; `None`: there is none.
    pub dropout: Option<Arc<dyn Dropout>>,
}

/// Dropout of the inputs of a network's adapters.
///
/// The same pass may be computed twice, in the backward pass too: one module then gets the same mask again.
pub trait Dropout: fmt::Debug + Send + Sync {
    /// `x` with a random part of its numbers set to 0 and the others enlarged accordingly; shape and dtype stay. As
    /// `torch.nn.Dropout`.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn apply(&self, module: &str, x: &Tensor) -> Result<Tensor>;
}

impl Adapter {
    /// The shapes of `down` and `up` for a layer whose weight is `[out, in]` or `[out, in, k, k]`.
    #[must_use]
    pub fn shapes(weight: &[usize], rank: usize) -> [Vec<usize>; 2] {
        let (mut down, mut up) = (weight.to_vec(), vec![1; weight.len()]);
        if let ([out, ..], [kept, ..], [first, second, ..]) = (weight, &mut down[..], &mut up[..]) {
            *kept = rank;
            (*first, *second) = (*out, rank);
        }
        [down, up]
    }
}

/// The weight of a linear layer or convolution, with an adapter or without.
#[derive(Clone, Debug)]
pub(super) struct AdaptedWeight {
    /// Name of the module, as `mid_block.resnets.0.conv1`.
    module: String,
    tensor: Tensor,
    adapter: Option<Adapter>,
}

impl AdaptedWeight {
    /// Takes `weight` of the module at `vb`.
    pub(super) fn new(vb: &VarBuilder<'_>, shape: impl Into<Shape>) -> Result<Self> {
        Ok(Self {
            module: vb.prefix(),
            tensor: vb.get(shape.into(), "weight")?,
            adapter: None,
        })
    }

    /// The weight as it is held, without the adapter.
    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The output of the layer with its adapter, if it has one. `output` is the layer's own output for `x`; `down` and `up` compute
    /// the two halves of the adapter with the given weight.
    pub(super) fn adapted(
        &self,
        output: Tensor,
        x: &Tensor,
        down: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
        up: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else {
            return Ok(output);
        };
        let like = |weight: &Tensor| ops::cast(weight, x.dtype());
        let dropped = match &adapter.dropout {
            Some(dropout) => &dropout.apply(&self.module, x)?,
            None => x,
        };
        let mut hidden = down(dropped, &like(&adapter.down)?)?;
        if adapter.scale != 1.0 {
            hidden = (hidden * adapter.scale)?;
        }
        ops::add(&up(&hidden, &like(&adapter.up)?)?, &output)
    }
}

/// A function that is called with every weight that can have an adapter.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&mut AdaptedWeight);

/// A part of a network.
pub(super) trait Adaptable {
    /// Calls `visit` with each of the part's weights that can have an adapter.
    fn each_weight(&mut self, visit: Visit<'_>);
}

impl Adaptable for AdaptedWeight {
    fn each_weight(&mut self, visit: Visit<'_>) {
        visit(self);
    }
}

impl<T: Adaptable> Adaptable for Option<T> {
    fn each_weight(&mut self, visit: Visit<'_>) {
        self.iter_mut().for_each(|part| part.each_weight(visit));
    }
}

impl<T: Adaptable> Adaptable for Vec<T> {
    fn each_weight(&mut self, visit: Visit<'_>) {
        self.iter_mut().for_each(|part| part.each_weight(visit));
    }
}

impl<T: Adaptable + Clone> Adaptable for Arc<T> {
    fn each_weight(&mut self, visit: Visit<'_>) {
        Arc::make_mut(self).each_weight(visit);
    }
}

impl<A: Adaptable, B: Adaptable> Adaptable for (A, B) {
    fn each_weight(&mut self, visit: Visit<'_>) {
        self.0.each_weight(visit);
        self.1.each_weight(visit);
    }
}

/// Implements [`Adaptable`] for a struct by its fields that have weights.
macro_rules! adaptable {
    ($type:ty: $($field:ident),+) => {
        impl $crate::models::adapter::Adaptable for $type {
            fn each_weight(&mut self, visit: $crate::models::adapter::Visit<'_>) {
                $($crate::models::adapter::Adaptable::each_weight(&mut self.$field, visit);)+
            }
        }
    };
}
pub(super) use adaptable;

/// The shape of each weight of `network` that can have an adapter, by the name of its module.
pub(super) fn shapes(network: &mut impl Adaptable) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    network.each_weight(&mut |weight| {
        shapes.insert(weight.module.clone(), weight.tensor.dims().to_vec());
    });
    shapes
}

/// Gives every layer of `network` its adapter in `adapters`, by the name of its module; a layer without one has none from now on.
///
/// # Errors
/// When an adapter's module is not in the network, or a shape does not fit.
pub(super) fn attach(
    network: &mut impl Adaptable,
    mut adapters: BTreeMap<String, Adapter>,
) -> Result<()> {
    let mut fault = None;
    network.each_weight(&mut |weight| {
        weight.adapter = adapters.remove(&weight.module);
        if let Some(Adapter { down, up, .. }) = &weight.adapter {
            let rank = down.dims().first().copied().unwrap_or(0);
            let [of_down, of_up] = Adapter::shapes(weight.tensor.dims(), rank);
            if down.dims() != of_down || up.dims() != of_up {
                fault.get_or_insert(format!(
                    "the adapter of {} is {:?} and {:?}, and the layer needs {of_down:?} and {of_up:?}",
                    weight.module,
                    down.dims(),
                    up.dims()
                ));
            }
        }
    });
    let unknown = |module| format!("the network has no layer {module}, which an adapter is of");
    match fault.or_else(|| adapters.keys().next().map(unknown)) {
        None => Ok(()),
        Some(fault) => Err(candle_core::Error::Msg(fault)),
    }
}
