//! Layers that hold parameters: thin structs over the functions of [`crate::ops`].

use candle_core::{Result, Tensor};

use super::activation::Activation;
use super::{ModelError, Scope};
use crate::ops;

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
        ops::linear(x, &self.weight, self.bias.as_ref())
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

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, Some(&self.bias), self.stride, self.padding)
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
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, false)
    }

    /// A SiLU is fused with the normalisation.
    pub(super) fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match activation {
            Activation::Silu => {
                ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, true)
            }
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
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}
