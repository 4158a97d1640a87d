//! Residual blocks and resampling, shared by the UNet and the autoencoder.

use candle_core::{Result, Tensor};

use super::layers::{Conv2d, GroupNorm, Linear};
use super::{ModelError, Scope};
use crate::ops;

/// Normalisation settings of a model's residual blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormConfig {
    pub(super) groups: usize,
    pub(super) eps: f64,
}

/// diffusers' `ResnetBlock2D` with `time_embedding_norm = "default"`.
#[derive(Clone, Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// `time_width` is the width of the time embedding, for blocks that take one.
    pub(super) fn new(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        time_width: Option<usize>,
        norm: NormConfig,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            norm1: GroupNorm::new(&scope.sub("norm1"), inputs, norm.groups, norm.eps)?,
            conv1: Conv2d::same3(&scope.sub("conv1"), inputs, outputs)?,
            time_emb_proj: time_width
                .map(|width| Linear::new(&scope.sub("time_emb_proj"), width, outputs))
                .transpose()?,
            norm2: GroupNorm::new(&scope.sub("norm2"), outputs, norm.groups, norm.eps)?,
            conv2: Conv2d::same3(&scope.sub("conv2"), outputs, outputs)?,
            conv_shortcut: (inputs != outputs)
                .then(|| Conv2d::pointwise(&scope.sub("conv_shortcut"), inputs, outputs))
                .transpose()?,
        })
    }

    /// `x`: `[B, inputs, H, W]`; `time`: the time embedding after its SiLU, `[B, time_width]`.
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(proj), Some(time)) = (&self.time_emb_proj, time) {
            let shift = proj.forward(time)?;
            let (b, c) = shift.dims2()?;
            h = h.broadcast_add(&shift.reshape((b, c, 1, 1))?)?;
        }
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x)?.add(&h),
            None => x.add(&h),
        }
    }
}

/// Nearest upsampling and a convolution.
#[derive(Clone, Debug)]
pub(super) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub(super) fn new(scope: &Scope<'_>, channels: usize) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            conv: Conv2d::same3(&scope.sub("conv"), channels, channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(&ops::upsample_nearest_2x(x)?)
    }
}
