//! Layers that hold parameters: thin structs over the functions of [`crate::ops`].
//!
//! Each reads `weight` and `bias` from a builder: this file is the one place where a parameter becomes part of a network.
//! A parameter may be held in another type than the network computes in, which is that of `x`; it is cast where it is used. A
//! trained network is built over copies in that type ([`ParamSet::with_copies`](crate::params::ParamSet::with_copies)).
//!
//! candle-nn's layers of the same names are not used: its `LayerNorm` has no gradient, its `Conv2d` a slow one, and all
//! compute in the type that the parameters are held in.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::activation::Activation;
use crate::ops;

/// A parameter in the type of `x`.
fn like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    ops::cast(parameter, x.dtype())
}

/// A norm's parameter as `x` needs it: norms of 16-bit numbers are computed in `f32`, with parameters as they are held.
fn norm_like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => Ok(parameter.clone()),
        _ => like(parameter, x),
    }
}

/// `torch.nn.Linear`: `[…, inputs]` → `[…, outputs]`.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight`: `[outputs, inputs]`, `bias`: `[outputs]`.
    pub(super) fn new(vb: VarBuilder<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        let bias = Some(vb.get(outputs, "bias")?);
        Ok(Self {
            bias,
            ..Self::without_bias(vb, inputs, outputs)?
        })
    }

    /// `weight`: `[outputs, inputs]`.
    pub(super) fn without_bias(vb: VarBuilder<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self {
            weight: vb.get((outputs, inputs), "weight")?,
            bias: None,
        })
    }

    /// Number of outputs.
    pub(super) fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|bias| like(bias, x)).transpose()?;
        ops::linear(x, &like(&self.weight, x)?, bias.as_ref())
    }
}

/// `torch.nn.Conv2d` with a square kernel: `[B, inputs, H, W]` → `[B, outputs, H', W']`.
#[derive(Clone, Debug)]
pub(super) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    /// `weight`: `[outputs, inputs, kernel, kernel]`, `bias`: `[outputs]`.
    pub(super) fn new(
        vb: VarBuilder<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Self> {
        Ok(Self {
            weight: vb.get((outputs, inputs, kernel, kernel), "weight")?,
            bias: vb.get(outputs, "bias")?,
            stride,
            padding,
        })
    }

    /// A convolution with an odd kernel that keeps height and width.
    pub(super) fn same(
        vb: VarBuilder<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
    ) -> Result<Self> {
        Self::new(vb, inputs, outputs, kernel, 1, kernel / 2)
    }

    /// A 3x3 convolution that keeps height and width.
    pub(super) fn same3(vb: VarBuilder<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        Self::same(vb, inputs, outputs, 3)
    }

    /// A 1x1 convolution.
    pub(super) fn pointwise(vb: VarBuilder<'_>, inputs: usize, outputs: usize) -> Result<Self> {
        Self::same(vb, inputs, outputs, 1)
    }

    /// The type that the weights are held in.
    pub(super) fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// As [`Module::forward`], plus `shift` `[B, outputs]` on the channels of each image.
    pub(super) fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let bias = ops::add_to_rows(shift, &like(&self.bias, x)?)?;
        self.convolve(x, &bias)
    }

    fn convolve(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let weight = like(&self.weight, x)?;
        ops::conv2d(x, &weight, Some(bias), self.stride, self.padding)
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.convolve(x, &like(&self.bias, x)?)
    }
}

/// An affine map of channels between a feature map and tokens: a 1x1 convolution or, with `use_linear_projection`, a linear
/// layer. The two differ in the shape of the stored weight only.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    weight: Tensor,
    bias: Tensor,
}

impl Projection {
    /// `weight`: `[outputs, inputs]` if `linear`, else `[outputs, inputs, 1, 1]`; `bias`: `[outputs]`.
    pub(super) fn new(
        vb: VarBuilder<'_>,
        inputs: usize,
        outputs: usize,
        linear: bool,
    ) -> Result<Self> {
        let shape = [outputs, inputs, 1, 1];
        let shape = if linear { &shape[..2] } else { &shape[..] };
        Ok(Self {
            weight: vb.get(shape, "weight")?,
            bias: vb.get(outputs, "bias")?,
        })
    }

    /// `[B, inputs, H, W]` → `[B, H·W, outputs]`.
    pub(super) fn to_tokens(&self, x: &Tensor) -> Result<Tensor> {
        ops::map_to_tokens(x, &like(&self.weight, x)?, &like(&self.bias, x)?)
    }

    /// `[B, H·W, inputs]` → `[B, outputs, H, W]`; `size` is `(H, W)`.
    pub(super) fn to_map(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        ops::tokens_to_map(x, &like(&self.weight, x)?, &like(&self.bias, x)?, size)
    }
}

/// `torch.nn.GroupNorm`: `[B, channels, …]` → the same shape.
#[derive(Clone, Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// `weight` and `bias`: `[channels]`.
    pub(super) fn new(
        vb: VarBuilder<'_>,
        channels: usize,
        groups: usize,
        eps: f64,
    ) -> Result<Self> {
        Ok(Self {
            weight: vb.get(channels, "weight")?,
            bias: vb.get(channels, "bias")?,
            groups,
            eps,
        })
    }

    /// The activation of the normalised `x`; SiLU is fused with the normalisation.
    pub(super) fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::Silu => self.normalise(x, true),
            other => self.forward(x)?.apply(&other),
        }
    }

    fn normalise(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (weight, bias) = (norm_like(&self.weight, x)?, norm_like(&self.bias, x)?);
        ops::group_norm(x, &weight, &bias, self.groups, self.eps, silu)
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.normalise(x, false)
    }
}

/// `torch.nn.LayerNorm` over the last dimension: `[…, width]` → the same shape.
#[derive(Clone, Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// `weight` and `bias`: `[width]`.
    pub(super) fn new(vb: VarBuilder<'_>, width: usize, eps: f64) -> Result<Self> {
        Ok(Self {
            weight: vb.get(width, "weight")?,
            bias: vb.get(width, "bias")?,
            eps,
        })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (norm_like(&self.weight, x)?, norm_like(&self.bias, x)?);
        ops::layer_norm(x, &weight, &bias, self.eps)
    }
}
