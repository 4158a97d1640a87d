//! Residual blocks and resampling, shared by the UNet and the autoencoder.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::activation::Activation;
use super::adapter::adaptable;
use super::layers::{Conv2d, GroupNorm, Linear};
use crate::ops;

/// Normalisation settings of a model's residual blocks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct NormConfig {
    pub(super) groups: usize,
    pub(super) eps: f64,
}

/// How a residual block uses the time embedding: diffusers' `time_embedding_norm`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TimeConfig {
    /// Width of the time embedding.
    pub(super) width: usize,
    /// Whether it scales and shifts the second normalisation; else it is added before that.
    pub(super) scale_shift: bool,
}

/// Settings that a model's residual blocks share.
#[derive(Clone, Copy, Debug, PartialEq)]
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

adaptable!(ResnetBlock: conv1, time_emb_proj, conv2, conv_shortcut);

impl ResnetBlock {
    pub(super) fn new(
        vb: VarBuilder<'_>,
        inputs: usize,
        outputs: usize,
        config: &ResnetConfig,
    ) -> Result<Self> {
        let time = |time: TimeConfig| {
            let width = if time.scale_shift {
                2 * outputs
            } else {
                outputs
            };
            Linear::new(vb.pp("time_emb_proj"), time.width, width)
        };
        let norm = config.norm;
        Ok(Self {
            norm1: GroupNorm::new(vb.pp("norm1"), inputs, norm.groups, norm.eps)?,
            conv1: Conv2d::same3(vb.pp("conv1"), inputs, outputs)?,
            time_emb_proj: config.time.map(time).transpose()?,
            norm2: GroupNorm::new(vb.pp("norm2"), outputs, norm.groups, norm.eps)?,
            conv2: Conv2d::same3(vb.pp("conv2"), outputs, outputs)?,
            conv_shortcut: (inputs != outputs)
                .then(|| Conv2d::pointwise(vb.pp("conv_shortcut"), inputs, outputs))
                .transpose()?,
            config: *config,
        })
    }

    /// `x`: `[B, inputs, H, W]`; `time`: the time embedding after the block's activation, `[B, time width]` →
    /// `[B, outputs, H, W]`.
    pub(super) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let activation = self.config.activation;
        let normed = self.norm1.forward_activated(x, activation)?;
        let time = match (&self.time_emb_proj, time) {
            (Some(proj), Some(time)) => Some(time.apply(proj)?),
            _ => None,
        };
        let h = match (time, self.config.time) {
            (Some(time), Some(TimeConfig { scale_shift, .. })) if scale_shift => {
                let time = time.unsqueeze(2)?.unsqueeze(3)?;
                let halves = time.chunk(2, 1)?;
                normed
                    .apply(&self.conv1)?
                    .apply(&self.norm2)?
                    .broadcast_mul(&(&halves[0] + 1.0)?)?
                    .broadcast_add(&halves[1])?
                    .apply(&activation)?
            }
            (time, _) => {
                let h = match time {
                    Some(time) => self.conv1.forward_shifted(&normed, &time)?,
                    None => normed.apply(&self.conv1)?,
                };
                self.norm2.forward_activated(&h, activation)?
            }
        };
        let h = h.apply(&self.conv2)?;
        let sum = ops::add(&x.apply(&self.conv_shortcut.as_ref())?, &h)?;
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

adaptable!(Downsample: conv);

impl Downsample {
    /// `padding` 1 pads all sides, 0 the right and the bottom only.
    pub(super) fn new(vb: VarBuilder<'_>, channels: usize, padding: usize) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::new(vb.pp("conv"), channels, channels, 3, 2, padding)?,
            asymmetric: padding == 0,
        })
    }
}

impl Module for Downsample {
    /// `[B, C, H, W]` → `[B, C, ⌈H/2⌉, ⌈W/2⌉]`, with `asymmetric` `⌊H/2⌋` and `⌊W/2⌋`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.asymmetric {
            let padded = x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
            padded.apply(&self.conv)
        } else {
            x.apply(&self.conv)
        }
    }
}

/// Nearest upsampling and a convolution: diffusers' `Upsample2D`.
#[derive(Clone, Debug)]
pub(super) struct Upsample {
    conv: Conv2d,
}

adaptable!(Upsample: conv);

impl Upsample {
    pub(super) fn new(vb: VarBuilder<'_>, channels: usize) -> Result<Self> {
        Ok(Self {
            conv: Conv2d::same3(vb.pp("conv"), channels, channels)?,
        })
    }

    /// `[B, C, H, W]` → `[B, C, size.0, size.1]`. `size` is not twice that of `x` where a feature map of odd sides was halved.
    pub(super) fn forward_to(&self, x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        if size == (2 * h, 2 * w) {
            return x.apply(self);
        }
        let resized = nearest(&nearest(x, 2, size.0)?, 3, size.1)?;
        resized.apply(&self.conv)
    }
}

impl Module for Upsample {
    /// `[B, C, H, W]` → `[B, C, 2H, 2W]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::upsample_nearest_2x(x)?.apply(&self.conv)
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
