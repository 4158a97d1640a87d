//! Layers that hold parameters: thin structs over the functions of [`crate::ops`].

use candle_core::{DType, Result, Tensor};

use super::activation::Activation;
use super::{ModelError, Scope};
use crate::ops;

/// A parameter in the type of `x`, in which a network computes; it may be held in another.
pub(super) fn like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    ops::cast(parameter, x.dtype())
}

/// A norm's parameter as `x` needs it: norms of 16-bit numbers are computed in `f32`, with parameters as they are held.
fn norm_like(parameter: &Tensor, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => Ok(parameter.clone()),
        _ => like(parameter, x),
    }
}

/// An affine map over the last dimension.
#[derive(Clone, Debug)]
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(super) fn new(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        let bias = Some(scope.get("bias", &[outputs])?);
        Ok(Self {
            bias,
            ..Self::without_bias(scope, inputs, outputs)?
        })
    }

    pub(super) fn without_bias(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            weight: scope.get("weight", &[outputs, inputs])?,
            bias: None,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|bias| like(bias, x)).transpose()?;
        ops::linear(x, &like(&self.weight, x)?, bias.as_ref())
    }
}

/// A square-kernel convolution.
#[derive(Clone, Debug)]
pub(super) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: usize,
    padding: usize,
}

impl Conv2d {
    pub(super) fn new(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            weight: scope.get("weight", &[outputs, inputs, kernel, kernel])?,
            bias: scope.get("bias", &[outputs])?,
            stride,
            padding,
        })
    }

    /// A convolution with an odd kernel that keeps the size.
    pub(super) fn same(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        kernel: usize,
    ) -> std::result::Result<Self, ModelError> {
        Self::new(scope, inputs, outputs, kernel, 1, kernel / 2)
    }

    /// A 3x3 convolution that keeps the size.
    pub(super) fn same3(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        Self::same(scope, inputs, outputs, 3)
    }

    /// A convolution of single pixels.
    pub(super) fn pointwise(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
    ) -> std::result::Result<Self, ModelError> {
        Self::new(scope, inputs, outputs, 1, 1, 0)
    }

    /// The type its weights are held in.
    pub(super) fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (like(&self.weight, x)?, like(&self.bias, x)?);
        ops::conv2d(x, &weight, Some(&bias), self.stride, self.padding)
    }

    /// As [`Self::forward`], plus `shift` `[B, outputs]` on each image's channels.
    pub(super) fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (like(&self.weight, x)?, like(&self.bias, x)?);
        let bias = shift.broadcast_add(&bias)?;
        ops::conv2d(x, &weight, Some(&bias), self.stride, self.padding)
    }
}

/// An affine map of channels between a feature map and tokens: a 1x1 convolution or, with `use_linear_projection`, a linear
/// layer, which is the same but for the shape its weight is written in.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    weight: Tensor,
    bias: Tensor,
}

impl Projection {
    pub(super) fn new(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        linear: bool,
    ) -> std::result::Result<Self, ModelError> {
        let shape = [outputs, inputs, 1, 1];
        let shape = if linear { &shape[..2] } else { &shape[..] };
        Ok(Self {
            weight: scope.get("weight", shape)?,
            bias: scope.get("bias", &[outputs])?,
        })
    }

    /// `[B, inputs, H, W]` → `[B, H·W, outputs]`.
    pub(super) fn to_tokens(&self, x: &Tensor) -> Result<Tensor> {
        ops::map_to_tokens(x, &like(&self.weight, x)?, &like(&self.bias, x)?)
    }

    /// `[B, H·W, inputs]` → `[B, outputs, H, W]`.
    pub(super) fn to_map(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        ops::tokens_to_map(x, &like(&self.weight, x)?, &like(&self.bias, x)?, size)
    }
}

/// Group normalisation, with an activation after it on demand.
#[derive(Clone, Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    pub(super) fn new(
        scope: &Scope<'_>,
        channels: usize,
        groups: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            weight: scope.get("weight", &[channels])?,
            bias: scope.get("bias", &[channels])?,
            groups,
            eps,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.normalise(x, false)
    }

    fn normalise(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (weight, bias) = (norm_like(&self.weight, x)?, norm_like(&self.bias, x)?);
        ops::group_norm(x, &weight, &bias, self.groups, self.eps, silu)
    }

    /// A SiLU is fused with the normalisation.
    pub(super) fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::Silu => self.normalise(x, true),
            other => other.forward(&self.forward(x)?),
        }
    }
}

/// Layer normalisation over the last dimension.
#[derive(Clone, Debug)]
pub(super) struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub(super) fn new(
        scope: &Scope<'_>,
        width: usize,
        eps: f64,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            weight: scope.get("weight", &[width])?,
            bias: scope.get("bias", &[width])?,
            eps,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (norm_like(&self.weight, x)?, norm_like(&self.bias, x)?);
        ops::layer_norm(x, &weight, &bias, self.eps)
    }
}
