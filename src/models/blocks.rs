//! Residual blocks and resampling, shared by the UNet and the autoencoder.

use candle_core::{Result, Tensor};

use super::activation::Activation;
use super::layers::{Conv2d, GroupNorm, Linear};
use super::{ModelError, Scope};
use crate::ops;

/// Normalisation settings of a model's residual blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct NormConfig {
    pub(super) groups: usize,
    pub(super) eps: f64,
}

/// How a residual block takes the time embedding in: diffusers' `time_embedding_norm`.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimeConfig {
    /// Width of the time embedding.
    pub(super) width: usize,
    /// Whether it scales and shifts the second normalisation instead of being added before it.
    pub(super) scale_shift: bool,
}

/// What a model's residual blocks have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResnetConfig {
    pub(super) norm: NormConfig,
    pub(super) activation: Activation,
    pub(super) time: Option<TimeConfig>,
    /// The sum of both branches is divided by this.
    pub(super) output_scale: f64,
}

/// diffusers' `ResnetBlock2D`.
#[derive(Clone, Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    config: ResnetConfig,
}

impl ResnetBlock {
    pub(super) fn new(
        scope: &Scope<'_>,
        inputs: usize,
        outputs: usize,
        config: &ResnetConfig,
    ) -> std::result::Result<Self, ModelError> {
        let time = |time: TimeConfig| {
            let width = if time.scale_shift {
                2 * outputs
            } else {
                outputs
            };
            Linear::new(&scope.sub("time_emb_proj"), time.width, width)
        };
        let norm = config.norm;
        Ok(Self {
            norm1: GroupNorm::new(&scope.sub("norm1"), inputs, norm.groups, norm.eps)?,
            conv1: Conv2d::same3(&scope.sub("conv1"), inputs, outputs)?,
            time_emb_proj: config.time.map(time).transpose()?,
            norm2: GroupNorm::new(&scope.sub("norm2"), outputs, norm.groups, norm.eps)?,
            conv2: Conv2d::same3(&scope.sub("conv2"), outputs, outputs)?,
            conv_shortcut: (inputs != outputs)
                .then(|| Conv2d::pointwise(&scope.sub("conv_shortcut"), inputs, outputs))
                .transpose()?,
            config: *config,
        })
    }

    /// `x`: `[B, inputs, H, W]`; `time`: the time embedding after the block's activation, `[B, time width]` →
    /// `[B, outputs, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let activation = self.config.activation;
        let mut h = self
            .conv1
            .forward(&self.norm1.forward_activated(x, activation)?)?;
        let time = match (&self.time_emb_proj, time) {
            (Some(proj), Some(time)) => {
                let time = proj.forward(time)?;
                let (b, width) = time.dims2()?;
                Some(time.reshape((b, width, 1, 1))?)
            }
            _ => None,
        };
        h = match (time, self.config.time) {
            (Some(time), Some(TimeConfig { scale_shift, .. })) if scale_shift => {
                let halves = time.chunk(2, 1)?;
                let scaled = self
                    .norm2
                    .forward(&h)?
                    .broadcast_mul(&(&halves[0] + 1.0)?)?
                    .broadcast_add(&halves[1])?;
                activation.forward(&scaled)?
            }
            (time, _) => {
                if let Some(time) = time {
                    h = h.broadcast_add(&time)?;
                }
                self.norm2.forward_activated(&h, activation)?
            }
        };
        h = self.conv2.forward(&h)?;
        let sum = match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x)?.add(&h),
            None => x.add(&h),
        }?;
        if self.config.output_scale == 1.0 {
            Ok(sum)
        } else {
            sum / self.config.output_scale
        }
    }
}

/// A 3x3 convolution with stride 2: diffusers' `Downsample2D`.
#[derive(Clone, Debug)]
pub(super) struct Downsample {
    conv: Conv2d,
    asymmetric: bool,
}

impl Downsample {
    /// `padding` 1 pads all sides, 0 the right and the bottom only.
    pub(super) fn new(
        scope: &Scope<'_>,
        channels: usize,
        padding: usize,
    ) -> std::result::Result<Self, ModelError> {
        Ok(Self {
            conv: Conv2d::new(&scope.sub("conv"), channels, channels, 3, 2, padding)?,
            asymmetric: padding == 0,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.asymmetric {
            let padded = x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
            self.conv.forward(&padded)
        } else {
            self.conv.forward(x)
        }
    }
}

/// Nearest upsampling and a convolution: diffusers' `Upsample2D`.
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

    /// To twice the size.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv.forward(&ops::upsample_nearest_2x(x)?)
    }

    /// To height and width `size`, which is not twice that of `x` where a feature map of odd sides was halved.
    pub(super) fn forward_to(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        if size == (2 * h, 2 * w) {
            return self.forward(x);
        }
        let resized = nearest(&nearest(x, 2, size.0)?, 3, size.1)?;
        self.conv.forward(&resized)
    }
}

/// Nearest interpolation of one dimension to `size`, as `torch.nn.functional.interpolate(…, mode="nearest")`.
fn nearest(x: &Tensor, dim: usize, size: usize) -> Result<Tensor> {
    let old = x.dim(dim)?;
    let scale = old as f32 / size as f32; // PyTorch rounds to f32, too
    let index: Vec<u32> = (0..size)
        .map(|i| ((i as f32 * scale) as usize).min(old - 1) as u32)
        .collect();
    let index = Tensor::from_vec(index, size, x.device())?;
    x.contiguous()?.index_select(&index, dim)
}
