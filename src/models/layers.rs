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
use super::adapter::{AdaptedWeight, adaptable};
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
    weight: AdaptedWeight,
    bias: Option<Tensor>,
}

adaptable!(Linear: weight);

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
            weight: AdaptedWeight::new(&vb, (outputs, inputs))?,
            bias: None,
        })
    }

    /// Number of outputs.
    pub(super) fn outputs(&self) -> usize {
        self.weight.tensor().dims()[0]
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|bias| like(bias, x)).transpose()?;
        let output = ops::linear(x, &like(self.weight.tensor(), x)?, bias.as_ref())?;
        let half = |x: &Tensor, weight: &Tensor| ops::linear(x, weight, None);
        self.weight.adapted(output, x, half, half)
    }
}

/// `torch.nn.Conv2d` with a square kernel: `[B, inputs, H, W]` → `[B, outputs, H', W']`.
#[derive(Clone, Debug)]
pub(super) struct Conv2d {
    weight: AdaptedWeight,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

adaptable!(Conv2d: weight);

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
            weight: AdaptedWeight::new(&vb, (outputs, inputs, kernel, kernel))?,
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
        self.weight.tensor().dtype()
    }

    /// As [`Module::forward`], plus `shift` `[B, outputs]` on the channels of each image.
    pub(super) fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let bias = ops::add_to_rows(shift, &like(&self.bias, x)?)?;
        self.convolve(x, &bias)
    }

    fn convolve(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (stride, padding) = (self.stride, self.padding);
        let weight = like(self.weight.tensor(), x)?;
        let output = ops::conv2d(x, &weight, Some(bias), stride, padding)?;
        let down = |x: &Tensor, weight: &Tensor| ops::conv2d(x, weight, None, stride, padding);
        let up = |x: &Tensor, weight: &Tensor| ops::conv2d(x, weight, None, 1, 0);
        self.weight.adapted(output, x, down, up)
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
    weight: AdaptedWeight,
    bias: Tensor,
}

adaptable!(Projection: weight);

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
            weight: AdaptedWeight::new(&vb, shape)?,
            bias: vb.get(outputs, "bias")?,
        })
    }

    /// `[B, inputs, H, W]` → `[B, H·W, outputs]`.
    pub(super) fn to_tokens(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (like(self.weight.tensor(), x)?, like(&self.bias, x)?);
        let output = ops::map_to_tokens(x, &weight, &bias)?;
        let down = |x: &Tensor, weight: &Tensor| ops::map_to_tokens(x, weight, &no_bias(weight)?);
        self.weight.adapted(output, x, down, per_token)
    }

    /// `[B, H·W, inputs]` → `[B, outputs, H, W]`; `size` is `(H, W)`.
    pub(super) fn to_map(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        let (weight, bias) = (like(self.weight.tensor(), x)?, like(&self.bias, x)?);
        let output = ops::tokens_to_map(x, &weight, &bias, size)?;
        let up =
            |x: &Tensor, weight: &Tensor| ops::tokens_to_map(x, weight, &no_bias(weight)?, size);
        self.weight.adapted(output, x, per_token, up)
    }
}

/// `[B, N, in]` → `[B, N, out]`. `weight`: `[out, in]` or `[out, in, 1, 1]`.
fn per_token(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    ops::linear(x, &weight.flatten_from(1)?, None)
}

/// The bias of a projection that has none: zeros.
fn no_bias(weight: &Tensor) -> Result<Tensor> {
    Tensor::zeros(weight.dim(0)?, weight.dtype(), weight.device())
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
