//! `UNet2DConditionModel`: the noise predictor of Stable Diffusion, teacher and student.

mod config;
mod levels;
mod time;

pub use config::UNetConfig;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use self::levels::LevelConfig;
use self::time::TimeEmbedding;
use super::adapter::{self, Adapter, adaptable};
use super::blocks::{Downsample, ResnetBlock, ResnetConfig, Upsample};
use super::layers::{Conv2d, GroupNorm};
use super::transformer::Transformer2d;
use super::{Conditioning, Denoiser, ModelError, Weights};
use crate::ops::{self, Activations, Attention, activation_checkpoint};

/// The stem of the weight files of diffusers' models.
pub const WEIGHTS_STEM: &str = "diffusion_pytorch_model";

/// The blocks at one resolution.
#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<Arc<ResnetBlock>>,
    attentions: Vec<Arc<Transformer2d>>,
}

adaptable!(Level: resnets, attentions);

impl Level {
    /// `inputs` gives the input channels of the `i`-th residual block.
    fn new(
        vb: VarBuilder<'_>,
        level: &LevelConfig,
        inputs: impl Fn(usize) -> usize,
        resnet: &ResnetConfig,
        config: &UNetConfig,
        attention: Attention,
    ) -> Result<Self> {
        let resnet = |i| {
            let vb = vb.pp("resnets").pp(i);
            ResnetBlock::new(vb, inputs(i), level.channels, resnet).map(Arc::new)
        };
        let transformers = config.transformers(level, attention);
        Ok(Self {
            resnets: (0..level.resnets).map(resnet).collect::<Result<_>>()?,
            attentions: transformers
                .iter()
                .enumerate()
                .map(|(i, transformer)| {
                    Transformer2d::new(vb.pp("attentions").pp(i), transformer).map(Arc::new)
                })
                .collect::<Result<_>>()?,
        })
    }

    /// The `i`-th residual block and the transformer after it, if any. Each is a unit of activation checkpointing, as in
    /// diffusers.
    ///
    /// `x`: `[B, C, H, W]` → `[B, channels, H, W]`.
    fn layer(&self, i: usize, x: &Tensor, shared: &SharedInputs<'_>) -> Result<Tensor> {
        let block = Arc::clone(&self.resnets[i]);
        let x = activation_checkpoint(x, &shared.time, shared.activations, move |x, time| {
            block.forward(x, Some(time))
        })?;
        let Some(block) = self.attentions.get(i) else {
            return Ok(x);
        };
        let block = Arc::clone(block);
        activation_checkpoint(&x, shared.context, shared.activations, move |x, context| {
            block.forward(x, context)
        })
    }
}

/// The operands that all blocks of a forward pass share.
struct SharedInputs<'a> {
    /// The embedding of timesteps, guidance, pooled text and size ids, `[B, width]`.
    time: Tensor,
    /// Text embeddings, `[B, T, cross_attention_dim]`.
    context: &'a Tensor,
    activations: Activations,
}

/// diffusers' `UNet2DConditionModel`.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    activations: Activations,
    /// The type to compute in, if it is not that of the weights.
    compute: Option<DType>,
    time_embedding: TimeEmbedding,
    conv_in: Conv2d,
    down: Vec<(Level, Option<Downsample>)>,
    mid: Option<Level>,
    up: Vec<(Level, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

adaptable!(UNet: time_embedding, conv_in, down, mid, up, conv_out);

impl UNet {
    /// Reads a UNet's folder as frozen tensors.
    ///
    /// # Errors
    /// When the folder is not a UNet that coffey builds; file, key or tensor are named.
    pub fn load(
        folder: &Path,
        dtype: DType,
        device: &Device,
        attention: Attention,
    ) -> std::result::Result<Self, ModelError> {
        let config = UNetConfig::read(folder)?;
        let weights = Weights::load(folder, WEIGHTS_STEM, dtype, device)?;
        let unet = Self::new(weights.builder(), &config, attention)?;
        weights.expect_all_taken(&[])?;
        Ok(unet)
    }

    /// Builds the network over the tensors of `vb`, frozen or variable.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn new(
        vb: VarBuilder<'_>,
        config: &UNetConfig,
        attention: Attention,
    ) -> std::result::Result<Self, ModelError> {
        let levels = config.down.len();
        let base = config.base_channels();
        let channels: Vec<usize> = config.down.iter().map(|level| level.channels).collect();
        let (resnet, norm) = (config.resnet, config.resnet.norm);

        let mut down = Vec::with_capacity(levels);
        for (i, level) in config.down.iter().enumerate() {
            let vb = vb.pp("down_blocks").pp(i);
            let inputs = |j| match j {
                0 => channels[i.saturating_sub(1)],
                _ => level.channels,
            };
            let blocks = Level::new(vb.clone(), level, inputs, &resnet, config, attention)?;
            let padding = config.downsample_padding;
            let downsample = (i + 1 < levels)
                .then(|| Downsample::new(vb.pp("downsamplers.0"), level.channels, padding))
                .transpose()?;
            down.push((blocks, downsample));
        }

        let mid_resnet = ResnetConfig {
            output_scale: config.mid_scale,
            ..resnet
        };
        let mid = config
            .mid
            .as_ref()
            .map(|level| {
                let vb = vb.pp("mid_block");
                let inputs = |_| level.channels;
                Level::new(vb, level, inputs, &mid_resnet, config, attention)
            })
            .transpose()?;

        let mut up = Vec::with_capacity(levels);
        for (i, level) in config.up.iter().enumerate() {
            let vb = vb.pp("up_blocks").pp(i);
            let above = channels[levels - 1 - i.saturating_sub(1)];
            let below = channels[(levels - 1 - i).saturating_sub(1)];
            // The channels from the blocks before, and those of the skip connection.
            let inputs = |j| {
                let first = if j == 0 { above } else { level.channels };
                let skip = if j + 1 == level.resnets {
                    below
                } else {
                    level.channels
                };
                first + skip
            };
            let blocks = Level::new(vb.clone(), level, inputs, &resnet, config, attention)?;
            let upsample = (i + 1 < levels)
                .then(|| Upsample::new(vb.pp("upsamplers.0"), level.channels))
                .transpose()?;
            up.push((blocks, upsample));
        }

        let (kernel_in, kernel_out) = (config.conv_in_kernel, config.conv_out_kernel);
        Ok(Self {
            time_embedding: TimeEmbedding::new(&vb, config)?,
            conv_in: Conv2d::same(vb.pp("conv_in"), config.in_channels, base, kernel_in)?,
            down,
            mid,
            up,
            conv_norm_out: GroupNorm::new(vb.pp("conv_norm_out"), base, norm.groups, norm.eps)?,
            conv_out: Conv2d::same(vb.pp("conv_out"), base, config.out_channels, kernel_out)?,
            config: config.clone(),
            activations: Activations::Keep,
            compute: None,
        })
    }

    /// The same network, which keeps or recomputes the activations of its blocks in the backward pass.
    pub fn with_activations(self, activations: Activations) -> Self {
        Self {
            activations,
            ..self
        }
    }

    /// The same network, which computes in the given type: weights are cast where they are used, and norms, the softmax of
    /// attention and sums stay in `f32`. As PyTorch's autocast.
    pub fn computing_in(self, compute: Option<DType>) -> Self {
        Self { compute, ..self }
    }

    /// The same network over the same weights, with adapters by the name of their module, as `down_blocks.0.resnets.0.conv1`.
    ///
    /// # Errors
    /// When an adapter's module is not in the network, or its shape does not fit.
    pub fn with_adapters(mut self, adapters: BTreeMap<String, Adapter>) -> Result<Self> {
        adapter::attach(&mut self, adapters)?;
        Ok(self)
    }

    /// The shape of each weight that can have an adapter, by the name of its module: `[out, in]` of a linear layer,
    /// `[out, in, k, k]` of a convolution.
    #[must_use]
    pub fn adaptable_weights(&self) -> BTreeMap<String, Vec<usize>> {
        adapter::shapes(&mut self.clone())
    }

    /// This network's configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    fn run(
        &self,
        latents: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (b, _, _, _) = latents.dims4()?;
        if timesteps.len() != b {
            candle_core::bail!("{} timesteps for a batch of {b}", timesteps.len());
        }
        let dtype = match (self.compute, self.conv_in.dtype()) {
            (Some(dtype), _) => dtype,
            (None, DType::F16 | DType::BF16) if latents.device().is_cpu() => DType::F32,
            (None, held) => held,
        };
        let mut x = ops::cast(latents, dtype)?;
        let context = ops::cast(&conditioning.hidden, dtype)?;
        let shared = SharedInputs {
            time: self.time_embedding.forward(timesteps, conditioning, &x)?,
            context: &context,
            activations: self.activations,
        };

        if self.config.center_input {
            x = x.affine(2.0, -1.0)?;
        }
        x = x.apply(&self.conv_in)?;
        let mut skips = vec![x.clone()];
        for (level, downsample) in &self.down {
            for i in 0..level.resnets.len() {
                x = level.layer(i, &x, &shared)?;
                skips.push(x.clone());
            }
            if let Some(downsample) = downsample {
                x = x.apply(downsample)?;
                skips.push(x.clone());
            }
        }
        if let Some(mid) = &self.mid {
            for i in 0..mid.resnets.len() {
                x = mid.layer(i, &x, &shared)?;
            }
        }
        for (level, upsample) in &self.up {
            for i in 0..level.resnets.len() {
                let Some(skip) = skips.pop() else {
                    candle_core::bail!(
                        "the up blocks ask for more skip connections than the down blocks made"
                    );
                };
                x = level.layer(i, &ops::concatenate(&x, &skip)?, &shared)?;
            }
            if let (Some(upsample), Some(next)) = (upsample, skips.last()) {
                let (_, _, h, w) = next.dims4()?;
                x = upsample.forward_to(&x, (h, w))?;
            }
        }
        let activation = self.config.resnet.activation;
        self.conv_norm_out
            .forward_activated(&x, activation)?
            .apply(&self.conv_out)?
            .to_dtype(latents.dtype())
    }
}

impl Denoiser for UNet {
    /// As diffusers' `UNet2DConditionModel.forward`. `latents`: `[B, in_channels, h, w]`, of any size → `[B, out_channels, h, w]`.
    /// Unless [`UNet::computing_in`] says otherwise, weights held in 16 bits are computed with in `f32` on the CPU, and in 16 bits
    /// elsewhere.
    fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        ops::in_pool(latents.device(), || {
            self.run(latents, timesteps, conditioning)
        })
    }

    fn guidance_width(&self) -> Option<usize> {
        self.config.time_cond_proj_dim
    }
}

/// Whether a UNet that computes in 16 bits casts the parameter of a name to them: all but those of norms, which are computed in
/// `f32`.
pub fn casts_parameter(name: &str) -> bool {
    let module = name.rsplit('.').nth(1).unwrap_or_default();
    !module.contains("norm")
}

/// The tensors of a student: the teacher's, and a new `time_embedding.cond_proj` drawn by `init` when the teacher has none.
///
/// `init` receives the number of elements and the bound of the uniform distribution `torch.nn.Linear` draws from.
///
/// # Errors
/// When the tensor can't be made.
pub fn student_tensors(
    mut teacher: BTreeMap<String, Tensor>,
    student: &UNetConfig,
    init: impl FnOnce(usize, f32) -> Vec<f32>,
) -> Result<BTreeMap<String, Tensor>> {
    const NAME: &str = "time_embedding.cond_proj.weight";
    if let (Some(width), false) = (student.time_cond_proj_dim, teacher.contains_key(NAME)) {
        let base = student.base_channels();
        let device = teacher
            .values()
            .next()
            .map_or(Device::Cpu, |t| t.device().clone());
        let data = init(base * width, 1.0 / (width as f32).sqrt());
        teacher.insert(
            NAME.to_owned(),
            Tensor::from_vec(data, (base, width), &device)?,
        );
    }
    Ok(teacher)
}
