//! `UNet2DConditionModel`: the noise predictor of Stable Diffusion, teacher and student.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use serde_json::{Map, Value, json};

use super::blocks::{NormConfig, ResnetBlock, Upsample};
use super::config::ConfigFile;
use super::layers::{Conv2d, GroupNorm, Linear};
use super::transformer::{Transformer2d, TransformerConfig};
use super::{ModelError, Scope, Weights};
use crate::ops::Attention;

/// The stem of the weight files of diffusers' models.
pub const WEIGHTS_STEM: &str = "diffusion_pytorch_model";

/// A UNet's `config.json`, as far as it decides the network.
#[derive(Clone, Debug)]
pub struct UNetConfig {
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Height and width of the latents it was trained on.
    pub sample_size: usize,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Width of the guidance embedding, for students.
    pub time_cond_proj_dim: Option<usize>,
    block_out_channels: Vec<usize>,
    layers_per_block: usize,
    down_attention: Vec<bool>,
    up_attention: Vec<bool>,
    heads: Vec<usize>,
    transformer_layers: Vec<usize>,
    norm: NormConfig,
    linear_projection: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    map: Map<String, Value>,
}

/// An integer for all levels or a list with one for each.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum PerLevel {
    One(usize),
    Each(Vec<usize>),
}

impl UNetConfig {
    /// Reads `config.json` from a UNet's folder.
    ///
    /// # Errors
    /// When it can't be read or asks for something that coffey does not build; the key is named.
    pub fn read(folder: &Path) -> std::result::Result<Self, ModelError> {
        let file = ConfigFile::read(folder)?;
        refuse_unsupported(&file)?;
        let block_out_channels: Vec<usize> =
            file.get("block_out_channels", vec![320, 640, 1280, 1280])?;
        file.refuse_levels(&block_out_channels)?;
        let levels = block_out_channels.len();
        let per_level =
            |key: &str, default: usize| -> std::result::Result<Vec<usize>, ModelError> {
                match file.get(key, PerLevel::One(default))? {
                    PerLevel::One(n) => Ok(vec![n; levels]),
                    PerLevel::Each(each) if each.len() == levels => Ok(each),
                    PerLevel::Each(each) => Err(file.unsupported(
                        key,
                        format!("{each:?}"),
                        format!("an integer or {levels} of them"),
                    )),
                }
            };
        let attention = |key: &str, with: &str, without: &str, default: Vec<&str>| {
            let types: Vec<String> =
                file.get(key, default.into_iter().map(str::to_owned).collect())?;
            if types.len() != levels {
                let wanted = format!("{levels} block types, as many as block_out_channels");
                return Err(file.unsupported(key, format!("{types:?}"), wanted));
            }
            let known = |t: String| match t {
                t if t == with => Ok(true),
                t if t == without => Ok(false),
                t => Err(file.unsupported(
                    key,
                    format!("\"{t}\""),
                    format!("\"{with}\", \"{without}\""),
                )),
            };
            types.into_iter().map(known).collect()
        };
        let (cross_down, cross_up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
        let (down, up) = ("DownBlock2D", "UpBlock2D");
        // In Stable Diffusion 1.x the key attention_head_dim holds the number of heads; num_attention_heads overrides it.
        let heads = match file.optional::<Value>("num_attention_heads")? {
            Some(_) => per_level("num_attention_heads", 8)?,
            None => per_level("attention_head_dim", 8)?,
        };
        let config = Self {
            in_channels: file.get("in_channels", 4)?,
            out_channels: file.get("out_channels", 4)?,
            sample_size: file.get("sample_size", 64)?,
            cross_attention_dim: file.get("cross_attention_dim", 1280)?,
            time_cond_proj_dim: file.optional("time_cond_proj_dim")?,
            layers_per_block: file.get("layers_per_block", 2)?,
            down_attention: attention(
                "down_block_types",
                cross_down,
                down,
                vec![cross_down, cross_down, cross_down, down],
            )?,
            up_attention: attention(
                "up_block_types",
                cross_up,
                up,
                vec![up, cross_up, cross_up, cross_up],
            )?,
            heads,
            transformer_layers: per_level("transformer_layers_per_block", 1)?,
            norm: NormConfig {
                groups: file.get("norm_num_groups", 32)?,
                eps: file.get("norm_eps", 1e-5)?,
            },
            linear_projection: file.get("use_linear_projection", false)?,
            flip_sin_to_cos: file.get("flip_sin_to_cos", true)?,
            freq_shift: file.get("freq_shift", 0.0)?,
            block_out_channels,
            map: file.map.clone(),
        };
        for (&channels, &heads) in config.block_out_channels.iter().zip(&config.heads) {
            if heads == 0 || channels % heads != 0 {
                return Err(file.unsupported(
                    "attention_head_dim",
                    heads,
                    format!("a divisor of {channels} channels"),
                ));
            }
            let groups = config.norm.groups;
            if groups == 0 || channels % groups != 0 {
                return Err(file.unsupported(
                    "norm_num_groups",
                    groups,
                    format!("a divisor of {channels} channels"),
                ));
            }
        }
        Ok(config)
    }

    /// The same network with a guidance embedding of `width`, unless it has one: the student of a teacher.
    pub fn with_guidance_embedding(&self, width: usize) -> Self {
        let mut student = self.clone();
        let width = *student.time_cond_proj_dim.get_or_insert(width);
        student
            .map
            .insert("time_cond_proj_dim".into(), json!(width));
        student.map.shift_remove("_name_or_path");
        student
    }

    /// `config.json` as it is written.
    pub fn to_json(&self) -> &Map<String, Value> {
        &self.map
    }

    /// Channels of the first level: the width of the sinusoidal time embedding.
    pub fn base_channels(&self) -> usize {
        self.block_out_channels.first().copied().unwrap_or(0)
    }

    /// Sides of the latents must be multiples of this.
    pub fn downscale(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    fn time_width(&self) -> usize {
        4 * self.base_channels()
    }

    fn transformer(&self, level: usize, attention: Attention) -> TransformerConfig {
        TransformerConfig {
            channels: self.block_out_channels[level],
            heads: self.heads[level],
            layers: self.transformer_layers[level],
            cross_attention_dim: self.cross_attention_dim,
            groups: self.norm.groups,
            linear_projection: self.linear_projection,
            attention,
        }
    }
}

/// Keys that would change the numbers and for which only diffusers' usual value is built.
fn refuse_unsupported(file: &ConfigFile) -> std::result::Result<(), ModelError> {
    for key in [
        "addition_embed_type",
        "addition_time_embed_dim",
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_class_embeds",
        "projection_class_embeddings_input_dim",
        "reverse_transformer_layers_per_block",
        "time_embedding_act_fn",
        "time_embedding_dim",
        "timestep_post_act",
    ] {
        file.only(key, &[])?;
    }
    for key in [
        "center_input_sample",
        "class_embeddings_concat",
        "dual_cross_attention",
        "mid_block_only_cross_attention",
        "only_cross_attention",
        "resnet_skip_time_act",
    ] {
        file.only(key, &[json!(false)])?;
    }
    for (key, value) in [
        ("act_fn", json!("silu")),
        ("attention_type", json!("default")),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("downsample_padding", json!(1)),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
    ] {
        file.only(key, &[value])?;
    }
    file.only("dropout", &[json!(0.0), json!(0)])?;
    file.only("mid_block_scale_factor", &[json!(1), json!(1.0)])?;
    file.only("resnet_out_scale_factor", &[json!(1.0), json!(1)])?;
    file.only("upcast_attention", &[json!(false), json!(true)])
}

/// What a UNet is conditioned on besides latents and timesteps. A struct, so that other models can add to it.
#[derive(Clone, Debug)]
pub struct Conditioning {
    /// Text embeddings, `[B, T, cross_attention_dim]`.
    pub prompt_embeds: Tensor,
    /// Embedding of the guidance scale, `[B, time_cond_proj_dim]`, for students.
    pub guidance_embedding: Option<Tensor>,
}

#[derive(Clone, Debug)]
struct Level {
    resnets: Vec<ResnetBlock>,
    attentions: Vec<Transformer2d>,
}

impl Level {
    fn layer(&self, i: usize, x: &Tensor, time: &Tensor, context: &Tensor) -> Result<Tensor> {
        let x = self.resnets[i].forward(x, Some(time))?;
        match self.attentions.get(i) {
            Some(attention) => attention.forward(&x, context),
            None => Ok(x),
        }
    }
}

#[derive(Clone, Debug)]
struct TimeEmbedding {
    linear_1: Linear,
    cond_proj: Option<Linear>,
    linear_2: Linear,
}

/// diffusers' `UNet2DConditionModel`.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    time_embedding: TimeEmbedding,
    conv_in: Conv2d,
    down: Vec<(Level, Option<Conv2d>)>,
    mid: Level,
    up: Vec<(Level, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

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
        let unet = Self::new(&weights.root(), &config, attention)?;
        weights.expect_all_taken(&[])?;
        Ok(unet)
    }

    /// Builds the network over the tensors of a scope, frozen or variable.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape.
    pub fn new(
        scope: &Scope<'_>,
        config: &UNetConfig,
        attention: Attention,
    ) -> std::result::Result<Self, ModelError> {
        let channels = &config.block_out_channels;
        let levels = channels.len();
        let (base, time_width) = (config.base_channels(), config.time_width());
        let last = *channels.last().unwrap_or(&base);
        let resnet = |scope: &Scope<'_>, i: usize, inputs, outputs| {
            ResnetBlock::new(
                &scope.sub("resnets").sub(i),
                inputs,
                outputs,
                Some(time_width),
                config.norm,
            )
        };
        let transformers = |scope: &Scope<'_>, level: usize, count: usize| {
            let transformer = config.transformer(level, attention);
            (0..count)
                .map(|i| Transformer2d::new(&scope.sub("attentions").sub(i), &transformer))
                .collect::<std::result::Result<Vec<_>, _>>()
        };

        let mut down = Vec::with_capacity(levels);
        for level in 0..levels {
            let scope = scope.sub("down_blocks").sub(level);
            let (inputs, outputs) = (channels[level.saturating_sub(1)], channels[level]);
            let resnets = (0..config.layers_per_block)
                .map(|i| resnet(&scope, i, if i == 0 { inputs } else { outputs }, outputs))
                .collect::<std::result::Result<_, _>>()?;
            let attentions = match config.down_attention[level] {
                true => transformers(&scope, level, config.layers_per_block)?,
                false => Vec::new(),
            };
            let downsample = (level + 1 < levels)
                .then(|| Conv2d::new(&scope.sub("downsamplers.0.conv"), outputs, outputs, 3, 2, 1))
                .transpose()?;
            down.push((
                Level {
                    resnets,
                    attentions,
                },
                downsample,
            ));
        }

        let mid_scope = scope.sub("mid_block");
        let mid = Level {
            resnets: vec![
                resnet(&mid_scope, 0, last, last)?,
                resnet(&mid_scope, 1, last, last)?,
            ],
            attentions: transformers(&mid_scope, levels - 1, 1)?,
        };

        let mut up = Vec::with_capacity(levels);
        let mut previous = last;
        for i in 0..levels {
            let level = levels - 1 - i;
            let scope = scope.sub("up_blocks").sub(i);
            let (outputs, below) = (channels[level], channels[level.saturating_sub(1)]);
            let count = config.layers_per_block + 1;
            let resnets = (0..count)
                .map(|j| {
                    let skip = if j + 1 == count { below } else { outputs };
                    let inputs = if j == 0 { previous } else { outputs };
                    resnet(&scope, j, inputs + skip, outputs)
                })
                .collect::<std::result::Result<_, _>>()?;
            let attentions = match config.up_attention[i] {
                true => transformers(&scope, level, count)?,
                false => Vec::new(),
            };
            let upsample = (i + 1 < levels)
                .then(|| Upsample::new(&scope.sub("upsamplers.0"), outputs))
                .transpose()?;
            up.push((
                Level {
                    resnets,
                    attentions,
                },
                upsample,
            ));
            previous = outputs;
        }

        let time = scope.sub("time_embedding");
        Ok(Self {
            config: config.clone(),
            time_embedding: TimeEmbedding {
                linear_1: Linear::new(&time.sub("linear_1"), base, time_width)?,
                cond_proj: config
                    .time_cond_proj_dim
                    .map(|width| Linear::without_bias(&time.sub("cond_proj"), width, base))
                    .transpose()?,
                linear_2: Linear::new(&time.sub("linear_2"), time_width, time_width)?,
            },
            conv_in: Conv2d::same3(&scope.sub("conv_in"), config.in_channels, base)?,
            down,
            mid,
            up,
            conv_norm_out: GroupNorm::new(
                &scope.sub("conv_norm_out"),
                base,
                config.norm.groups,
                config.norm.eps,
            )?,
            conv_out: Conv2d::same3(&scope.sub("conv_out"), base, config.out_channels)?,
        })
    }

    /// This network's configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The raw prediction for noisy latents.
    ///
    /// `latents`: `[B, in_channels, h, w]` with `h` and `w` divisible by 2^(levels-1); `timesteps`: one a sample →
    /// `[B, out_channels, h, w]`. As `UNet2DConditionModel.forward`.
    ///
    /// # Errors
    /// When the shapes do not fit the network.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[i64],
        conditioning: &Conditioning,
    ) -> Result<Tensor> {
        let (b, _, h, w) = latents.dims4()?;
        let step = self.config.downscale();
        if h % step != 0 || w % step != 0 {
            candle_core::bail!(
                "latents of {h}x{w} do not halve {} times: use multiples of {step}",
                self.down.len() - 1
            );
        }
        if timesteps.len() != b {
            candle_core::bail!("{} timesteps for a batch of {b}", timesteps.len());
        }
        let time = self.embed_time(timesteps, conditioning, latents)?;
        let context = &conditioning.prompt_embeds;

        let mut x = self.conv_in.forward(latents)?;
        let mut skips = vec![x.clone()];
        for (level, downsample) in &self.down {
            for i in 0..level.resnets.len() {
                x = level.layer(i, &x, &time, context)?;
                skips.push(x.clone());
            }
            if let Some(downsample) = downsample {
                x = downsample.forward(&x)?;
                skips.push(x.clone());
            }
        }
        x = self.mid.layer(0, &x, &time, context)?;
        x = self.mid.resnets[1].forward(&x, Some(&time))?;
        for (level, upsample) in &self.up {
            for i in 0..level.resnets.len() {
                let Some(skip) = skips.pop() else {
                    candle_core::bail!(
                        "the up blocks ask for more skip connections than the down blocks made"
                    );
                };
                x = level.layer(i, &Tensor::cat(&[&x, &skip], 1)?, &time, context)?;
            }
            if let Some(upsample) = upsample {
                x = upsample.forward(&x)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)
    }

    /// The time embedding after its last SiLU, `[B, 4·base]`: every residual block starts with that SiLU.
    fn embed_time(
        &self,
        timesteps: &[i64],
        conditioning: &Conditioning,
        like: &Tensor,
    ) -> Result<Tensor> {
        let mut x = sinusoidal(timesteps, self.config.base_channels(), &self.config)?
            .to_device(like.device())?
            .to_dtype(like.dtype())?;
        match (
            &self.time_embedding.cond_proj,
            &conditioning.guidance_embedding,
        ) {
            (Some(proj), Some(guidance)) => x = x.add(&proj.forward(guidance)?)?,
            (None, Some(_)) => {
                candle_core::bail!("this UNet takes no guidance embedding (no time_cond_proj_dim)")
            }
            _ => {}
        }
        let x = self.time_embedding.linear_1.forward(&x)?.silu()?;
        self.time_embedding.linear_2.forward(&x)?.silu()
    }
}

/// diffusers' `get_timestep_embedding`: `[B, width]` f32.
fn sinusoidal(timesteps: &[i64], width: usize, config: &UNetConfig) -> Result<Tensor> {
    let half = width / 2;
    let mut data = vec![0f32; timesteps.len() * width];
    for (row, &t) in data.chunks_exact_mut(width).zip(timesteps) {
        for i in 0..half {
            let exponent = -(10000f32.ln()) * i as f32 / (half as f64 - config.freq_shift) as f32;
            let angle = t as f32 * exponent.exp();
            let (sin, cos) = (angle.sin(), angle.cos());
            let (first, second) = if config.flip_sin_to_cos {
                (cos, sin)
            } else {
                (sin, cos)
            };
            row[i] = first;
            row[half + i] = second;
        }
    }
    Tensor::from_vec(data, (timesteps.len(), width), &Device::Cpu)
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
