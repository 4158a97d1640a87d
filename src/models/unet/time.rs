//! The embeddings of a UNet that its residual blocks add: of timesteps, and of SDXL's pooled text and size ids.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::UNetConfig;
use super::config::{AddedConfig, TimeEmbeddingConfig};
use crate::models::Conditioning;
use crate::models::activation::Activation;
use crate::models::layers::Linear;
use crate::ops;

/// Size ids of a sample: original height and width, the crop's top and left, target height and width.
pub(super) const SIZE_IDS: usize = 6;

/// diffusers' `Timesteps` and `TimestepEmbedding`.
#[derive(Clone, Debug)]
pub(super) struct TimeEmbedding {
    linear_1: Linear,
    cond_proj: Option<Linear>,
    linear_2: Linear,
    added: Option<AddedEmbedding>,
    base: usize,
    config: TimeEmbeddingConfig,
}

impl TimeEmbedding {
    /// `root`: the network's builder.
    pub(super) fn new(root: &VarBuilder<'_>, config: &UNetConfig) -> Result<Self> {
        let (base, width) = (config.base_channels(), config.time.width);
        let vb = root.pp("time_embedding");
        let added = config
            .added
            .map(|added| AddedEmbedding::new(root.pp("add_embedding"), added, width, config.time));
        Ok(Self {
            linear_1: Linear::new(vb.pp("linear_1"), base, width)?,
            cond_proj: config
                .time_cond_proj_dim
                .map(|guidance| Linear::without_bias(vb.pp("cond_proj"), guidance, base))
                .transpose()?,
            linear_2: Linear::new(vb.pp("linear_2"), width, width)?,
            added: added.transpose()?,
            base,
            config: config.time,
        })
    }

    /// The embedding as residual blocks use it, `[B, width]`. Each block starts with the network's activation of it, which is
    /// computed once here.
    ///
    /// `conditioning.guidance`: `[B, time_cond_proj_dim]`, for students; `like` gives the dtype and the device to compute in.
    pub(super) fn forward(
        &self,
        timesteps: &[i64],
        conditioning: &Conditioning,
        like: &Tensor,
    ) -> Result<Tensor> {
        let timesteps: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
        let timesteps = Tensor::new(timesteps, &Device::Cpu)?;
        let mut x = sinusoidal(&timesteps, self.base, &self.config)?
            .to_device(like.device())?
            .to_dtype(like.dtype())?;
        match (&self.cond_proj, &conditioning.guidance) {
            (Some(proj), Some(guidance)) => {
                x = x.add(&ops::cast(guidance, like.dtype())?.apply(proj)?)?;
            }
            (None, Some(_)) => {
                candle_core::bail!("this UNet takes no guidance embedding (no time_cond_proj_dim)")
            }
            _ => {}
        }
        let activation = self.config.activation;
        x = x
            .apply(&self.linear_1)?
            .apply(&activation)?
            .apply(&self.linear_2)?
            .apply(&self.config.post.as_ref())?;
        match (&self.added, &conditioning.pooled, &conditioning.size) {
            (Some(added), Some(pooled), Some(size)) => {
                x = x.add(&added.forward(pooled, size, like)?)?;
            }
            (None, None, None) => {}
            (Some(_), ..) => candle_core::bail!(
                "this UNet takes a pooled text embedding and size ids (addition_embed_type = \"text_time\")"
            ),
            (None, ..) => candle_core::bail!(
                "this UNet takes no pooled text embedding and no size ids (no addition_embed_type)"
            ),
        }
        x.apply(&self.config.last.as_ref())?.apply(&activation)
    }
}

/// `add_embedding` of diffusers' UNets with `addition_embed_type = "text_time"` (`get_aug_embed` of `unet_2d_condition.py`).
#[derive(Clone, Debug)]
struct AddedEmbedding {
    linear_1: Linear,
    linear_2: Linear,
    config: AddedConfig,
    time: TimeEmbeddingConfig,
}

impl AddedEmbedding {
    fn new(
        vb: VarBuilder<'_>,
        config: AddedConfig,
        width: usize,
        time: TimeEmbeddingConfig,
    ) -> Result<Self> {
        let inputs = config.pooled + SIZE_IDS * config.id_width;
        Ok(Self {
            linear_1: Linear::new(vb.pp("linear_1"), inputs, width)?,
            linear_2: Linear::new(vb.pp("linear_2"), width, width)?,
            config,
            time,
        })
    }

    /// `pooled`: `[B, pooled]`, `size`: `[B, 6]` f32 → `[B, width]` in the dtype of `like`. Ids and their sinusoids are f32: 16-bit
    /// types hold no ids above 256 (`bf16`) or 2048 (`f16`) exactly.
    fn forward(&self, pooled: &Tensor, size: &Tensor, like: &Tensor) -> Result<Tensor> {
        let (b, ids) = size.dims2()?;
        if ids != SIZE_IDS || pooled.dims() != [b, self.config.pooled] {
            candle_core::bail!(
                "a pooled text embedding of shape {:?} and size ids of shape {:?}; this UNet takes [B, {}] and [B, {SIZE_IDS}]",
                pooled.dims(),
                size.dims(),
                self.config.pooled
            );
        }
        let sinusoids = sinusoidal(&size.flatten_all()?, self.config.id_width, &self.time)?;
        let sinusoids = sinusoids.reshape((b, SIZE_IDS * self.config.id_width))?;
        Tensor::cat(&[&pooled.to_dtype(DType::F32)?, &sinusoids], 1)?
            .to_device(like.device())?
            .to_dtype(like.dtype())?
            .apply(&self.linear_1)?
            // diffusers builds this embedding with its default activation, whatever act_fn says.
            .apply(&Activation::Silu)?
            .apply(&self.linear_2)
    }
}

/// diffusers' `get_timestep_embedding`: `[N]` f32 → `[N, width]` f32; the last column of an odd width is 0.
fn sinusoidal(values: &Tensor, width: usize, config: &TimeEmbeddingConfig) -> Result<Tensor> {
    let half = width / 2;
    if half == 0 {
        return Tensor::zeros((values.dim(0)?, width), DType::F32, values.device());
    }
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = -(10000f32.ln()) * i as f32 / (half as f64 - config.freq_shift) as f32;
            exponent.exp()
        })
        .collect();
    let frequencies = Tensor::new(frequencies, values.device())?.unsqueeze(0)?;
    let angles = values.unsqueeze(1)?.broadcast_mul(&frequencies)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    let halves = if config.flip_sin_to_cos {
        [cos, sin]
    } else {
        [sin, cos]
    };
    Tensor::cat(&halves, 1)?.pad_with_zeros(1, 0, width - 2 * half)
}
