//! `AutoencoderKL`: pixels to the moments of latents, and latents back to pixels.

use std::path::Path;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use serde_json::json;

use super::activation::Activation;
use super::blocks::{Downsample, NormConfig, ResnetBlock, ResnetConfig, Upsample};
use super::config::{Class, ConfigFile, range};
use super::layers::{Conv2d, GroupNorm, Projection};
use super::unet::WEIGHTS_STEM;
use super::{ModelError, Weights};
use crate::ops::{self, Attention};

const CLASS: Class = Class {
    name: "AutoencoderKL",
    keys: &[
        "act_fn",
        "block_out_channels",
        "down_block_types",
        "force_upcast", // to f32, the type that coffey computes in
        "in_channels",
        "latent_channels",
        "latents_mean",
        "latents_std",
        "layers_per_block",
        "mid_block_add_attention",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "up_block_types",
        "use_post_quant_conv",
        "use_quant_conv",
    ],
};

/// An autoencoder's `config.json`, as far as it decides the network.
#[derive(Clone, Debug)]
pub struct VaeConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Factor that gives latents about unit variance, as the UNet takes them.
    pub scaling_factor: f64,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    resnet: ResnetConfig,
    quant_conv: bool,
    post_quant_conv: bool,
    mid_attention: bool,
}

impl VaeConfig {
    /// Reads `config.json` from an autoencoder's folder.
    ///
    /// # Errors
    /// When it can't be read or asks for something that coffey does not build; the key is named.
    pub fn read(folder: &Path) -> std::result::Result<Self, ModelError> {
        let file = ConfigFile::read_class(folder, &CLASS)?;
        for key in ["in_channels", "out_channels"] {
            file.only(key, &[json!(3)]);
        }
        file.only("shift_factor", &[json!(0.0), json!(0)]);
        file.only("latents_mean", &[]);
        file.only("latents_std", &[]);
        let block_out_channels = file.levels(&[64])?;
        for (key, only) in [
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ] {
            let types: Vec<String> = file.get(key, vec![only.to_owned()]);
            if types.len() != block_out_channels.len() || types.iter().any(|t| t != only) {
                let wanted = format!("\"{only}\", as many as block_out_channels");
                file.refuse(key, format!("{types:?}"), wanted);
            }
        }
        let config = Self {
            latent_channels: file.whole("latent_channels", 4, range::WIDTH),
            scaling_factor: file.real("scaling_factor", 0.18215, range::FACTOR),
            layers_per_block: file.whole("layers_per_block", 1, range::LAYERS),
            resnet: ResnetConfig {
                norm: NormConfig {
                    groups: file.groups(&block_out_channels),
                    eps: 1e-6,
                },
                activation: file.activation("act_fn").unwrap_or(Activation::Silu),
                time: None,
                output_scale: 1.0,
            },
            quant_conv: file.get("use_quant_conv", true),
            post_quant_conv: file.get("use_post_quant_conv", true),
            mid_attention: file.get("mid_block_add_attention", true),
            block_out_channels,
        };
        file.finish(Ok(config))
    }

    /// Numbers of the one head of attention; `None` without attention.
    pub fn head_width(&self) -> Option<usize> {
        let widest = self.block_out_channels.last().copied();
        widest.filter(|_| self.mid_attention)
    }

    /// Channels of the first level.
    pub fn base_channels(&self) -> usize {
        self.block_out_channels[0]
    }

    /// Pixels of a latent along one side.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// Attention of the autoencoder's middle: one head over all pixels, with a residual connection.
#[derive(Clone, Debug)]
struct MidAttention {
    group_norm: GroupNorm,
    to_q: Projection,
    to_k: Projection,
    to_v: Projection,
    to_out: Projection,
}

impl MidAttention {
    fn new(vb: VarBuilder<'_>, channels: usize, norm: NormConfig) -> Result<Self> {
        // Files from before diffusers 0.18 say query, key, value and proj_attn.
        let linear = |new: &str, old: &str| {
            let old = vb.pp(old);
            let vb = if old.contains_tensor("weight") {
                old
            } else {
                vb.pp(new)
            };
            Projection::new(vb, channels, channels, true)
        };
        Ok(Self {
            group_norm: GroupNorm::new(vb.pp("group_norm"), channels, norm.groups, norm.eps)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }
}

impl Module for MidAttention {
    /// `[B, C, H, W]` → the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let normed = x.apply(&self.group_norm)?;
        let q = self.to_q.to_tokens(&normed)?;
        let k = self.to_k.to_tokens(&normed)?;
        let v = self.to_v.to_tokens(&normed)?;
        let out = ops::attention(&q, &k, &v, 1, false, Attention::MemoryEfficient)?;
        ops::add(&self.to_out.to_map(&out, (h, w))?, x)
    }
}

/// diffusers' `UNetMidBlock2D` without a time embedding.
#[derive(Clone, Debug)]
struct Mid {
    resnets: [ResnetBlock; 2],
    attention: Option<MidAttention>,
}

impl Mid {
    fn new(vb: VarBuilder<'_>, channels: usize, config: &VaeConfig) -> Result<Self> {
        let resnet = |i| {
            let vb = vb.pp("resnets").pp(i);
            ResnetBlock::new(vb, channels, channels, &config.resnet)
        };
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: config
                .mid_attention
                .then(|| MidAttention::new(vb.pp("attentions.0"), channels, config.resnet.norm))
                .transpose()?,
        })
    }
}

impl Module for Mid {
    /// `[B, C, H, W]` → the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.resnets[0].forward(x, None)?;
        let x = x.apply(&self.attention.as_ref())?;
        self.resnets[1].forward(&x, None)
    }
}

/// diffusers' `Encoder`, with the convolution after it.
#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    down: Vec<(Vec<ResnetBlock>, Option<Downsample>)>,
    mid: Mid,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    quant_conv: Option<Conv2d>,
}

/// diffusers' `Decoder`, with the convolution before it.
#[derive(Clone, Debug)]
struct Decoder {
    post_quant_conv: Option<Conv2d>,
    conv_in: Conv2d,
    mid: Mid,
    up: Vec<(Vec<ResnetBlock>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// diffusers' `AutoencoderKL`.
#[derive(Clone, Debug)]
pub struct AutoencoderKl {
    config: VaeConfig,
    encoder: Encoder,
    decoder: Option<Decoder>,
}

impl AutoencoderKl {
    /// Reads an autoencoder's folder.
    ///
    /// # Errors
    /// When the folder is not an autoencoder that coffey builds; file, key or tensor are named.
    pub fn load(
        folder: &Path,
        dtype: DType,
        device: &Device,
    ) -> std::result::Result<Self, ModelError> {
        let config = VaeConfig::read(folder)?;
        let weights = Weights::load(folder, WEIGHTS_STEM, dtype, device)?;
        let vae = Self {
            encoder: Encoder::new(&weights.builder(), &config)?,
            decoder: Some(Decoder::new(&weights.builder(), &config)?),
            config,
        };
        weights.expect_all_taken(&[])?;
        Ok(vae)
    }

    /// The encoder alone: more than half of the weights are the decoder's.
    #[must_use]
    pub fn without_decoder(self) -> Self {
        Self {
            decoder: None,
            ..self
        }
    }

    /// This autoencoder's configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Moments of the latents' distribution: mean, then log-variance, unscaled.
    ///
    /// `pixels`: `[B, 3, H, W]` f32 in [-1, 1] → `[B, 2·latent_channels, H/f, W/f]` f32, computed in the type of the weights. As diffusers'
    /// `AutoencoderKL.encode(…).latent_dist.parameters`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        ops::in_pool(pixels.device(), || {
            let pixels = ops::cast(pixels, self.encoder.conv_in.dtype())?;
            ops::cast(&self.run_encoder(&pixels)?, DType::F32)
        })
    }

    /// Whether a batch of images of this side is encoded on the CPU to the bits that each image would give alone.
    pub fn encodes_alike(&self, side: usize) -> bool {
        let widest = self.config.block_out_channels.iter().max();
        ops::convolves_alike(
            widest.copied().unwrap_or_default(),
            side / self.config.downscale(),
        )
    }

    fn run_encoder(&self, pixels: &Tensor) -> Result<Tensor> {
        let encoder = &self.encoder;
        let mut x = pixels.apply(&encoder.conv_in)?;
        for (resnets, downsample) in &encoder.down {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            x = x.apply(&downsample.as_ref())?;
        }
        let x = x.apply(&encoder.mid)?;
        // diffusers takes SiLU here whatever act_fn says.
        encoder
            .conv_norm_out
            .forward_activated(&x, Activation::Silu)?
            .apply(&encoder.conv_out)?
            .apply(&encoder.quant_conv.as_ref())
    }

    /// Pixels of unscaled latents.
    ///
    /// `latents`: `[B, latent_channels, h, w]` f32 → `[B, 3, h·f, w·f]` f32, about in [-1, 1], computed in the type of the weights. As diffusers'
    /// `AutoencoderKL.decode`.
    ///
    /// # Errors
    /// When the shapes do not fit, or after [`without_decoder`](Self::without_decoder).
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        ops::in_pool(latents.device(), || {
            let latents = ops::cast(latents, self.encoder.conv_in.dtype())?;
            ops::cast(&self.run_decoder(&latents)?, DType::F32)
        })
    }

    fn run_decoder(&self, latents: &Tensor) -> Result<Tensor> {
        let Some(decoder) = &self.decoder else {
            candle_core::bail!("an autoencoder without its decoder can't decode");
        };
        let mut x = latents
            .apply(&decoder.post_quant_conv.as_ref())?
            .apply(&decoder.conv_in)?
            .apply(&decoder.mid)?;
        for (resnets, upsample) in &decoder.up {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            x = x.apply(&upsample.as_ref())?;
        }
        decoder
            .conv_norm_out
            .forward_activated(&x, Activation::Silu)?
            .apply(&decoder.conv_out)
    }
}

impl Encoder {
    fn new(root: &VarBuilder<'_>, config: &VaeConfig) -> Result<Self> {
        let vb = root.pp("encoder");
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let moments = 2 * config.latent_channels;
        let mut down = Vec::new();
        for (level, &outputs) in channels.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(level);
            let inputs = channels[level.saturating_sub(1)];
            let resnets = (0..config.layers_per_block)
                .map(|i| {
                    let inputs = if i == 0 { inputs } else { outputs };
                    let vb = vb.pp("resnets").pp(i);
                    ResnetBlock::new(vb, inputs, outputs, &config.resnet)
                })
                .collect::<Result<_>>()?;
            let downsample = (level + 1 < channels.len())
                .then(|| Downsample::new(vb.pp("downsamplers.0"), outputs, 0))
                .transpose()?;
            down.push((resnets, downsample));
        }
        Ok(Self {
            conv_in: Conv2d::same3(vb.pp("conv_in"), 3, first)?,
            down,
            mid: Mid::new(vb.pp("mid_block"), last, config)?,
            conv_norm_out: GroupNorm::new(
                vb.pp("conv_norm_out"),
                last,
                config.resnet.norm.groups,
                config.resnet.norm.eps,
            )?,
            conv_out: Conv2d::same3(vb.pp("conv_out"), last, moments)?,
            quant_conv: config
                .quant_conv
                .then(|| Conv2d::pointwise(root.pp("quant_conv"), moments, moments))
                .transpose()?,
        })
    }
}

impl Decoder {
    fn new(root: &VarBuilder<'_>, config: &VaeConfig) -> Result<Self> {
        let vb = root.pp("decoder");
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let latent = config.latent_channels;
        let mut up = Vec::new();
        let mut inputs = last;
        for (i, &outputs) in channels.iter().rev().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let resnets = (0..=config.layers_per_block)
                .map(|j| {
                    let inputs = if j == 0 { inputs } else { outputs };
                    let vb = vb.pp("resnets").pp(j);
                    ResnetBlock::new(vb, inputs, outputs, &config.resnet)
                })
                .collect::<Result<_>>()?;
            let upsample = (i + 1 < channels.len())
                .then(|| Upsample::new(vb.pp("upsamplers.0"), outputs))
                .transpose()?;
            up.push((resnets, upsample));
            inputs = outputs;
        }
        Ok(Self {
            post_quant_conv: config
                .post_quant_conv
                .then(|| Conv2d::pointwise(root.pp("post_quant_conv"), latent, latent))
                .transpose()?,
            conv_in: Conv2d::same3(vb.pp("conv_in"), latent, last)?,
            mid: Mid::new(vb.pp("mid_block"), last, config)?,
            up,
            conv_norm_out: GroupNorm::new(
                vb.pp("conv_norm_out"),
                first,
                config.resnet.norm.groups,
                config.resnet.norm.eps,
            )?,
            conv_out: Conv2d::same3(vb.pp("conv_out"), first, 3)?,
        })
    }
}

/// Latents drawn from moments: `(mean + exp(½ logvar)·noise) · scaling_factor`, log-variance clamped to [-30, 20].
///
/// `moments`: `[B, 2C, h, w]`, `noise`: `[B, C, h, w]`, standard normal, of one dtype → `[B, C, h, w]` in that dtype. As
/// diffusers' `DiagonalGaussianDistribution.sample` times `scaling_factor`.
///
/// # Errors
/// When the shapes do not fit.
pub fn sample_latents(moments: &Tensor, noise: &Tensor, scaling_factor: f64) -> Result<Tensor> {
    let c = noise.dim(D::Minus(3))?;
    let mean = moments.narrow(1, 0, c)?;
    let std = (moments.narrow(1, c, c)?.clamp(-30.0, 20.0)? * 0.5)?.exp()?;
    (mean + (std * noise)?)? * scaling_factor
}
