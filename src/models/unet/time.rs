//! The time embedding of a UNet.

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::UNetConfig;
use super::config::TimeEmbeddingConfig;
use crate::models::adapter::adaptable;
use crate::models::layers::Linear;

/// diffusers' `Timesteps` and `TimestepEmbedding`.
#[derive(Clone, Debug)]
pub(super) struct TimeEmbedding {
    linear_1: Linear,
    cond_proj: Option<Linear>,
    linear_2: Linear,
    base: usize,
    config: TimeEmbeddingConfig,
}

adaptable!(TimeEmbedding: linear_1, cond_proj, linear_2);

impl TimeEmbedding {
    pub(super) fn new(vb: VarBuilder<'_>, config: &UNetConfig) -> Result<Self> {
        let (base, width) = (config.base_channels(), config.time.width);
        Ok(Self {
            linear_1: Linear::new(vb.pp("linear_1"), base, width)?,
            cond_proj: config
                .time_cond_proj_dim
                .map(|guidance| Linear::without_bias(vb.pp("cond_proj"), guidance, base))
                .transpose()?,
            linear_2: Linear::new(vb.pp("linear_2"), width, width)?,
            base,
            config: config.time,
        })
    }

    /// The embedding as residual blocks use it, `[B, width]`. Each block starts with the network's activation of it, which is
    /// computed once here.
    ///
    /// `guidance`: `[B, time_cond_proj_dim]`, for students; `like` gives the dtype and the device to compute in.
    pub(super) fn forward(
        &self,
        timesteps: &[i64],
        guidance: Option<&Tensor>,
        like: &Tensor,
    ) -> Result<Tensor> {
        let mut x = sinusoidal(timesteps, self.base, &self.config)?
            .to_device(like.device())?
            .to_dtype(like.dtype())?;
        match (&self.cond_proj, guidance) {
            (Some(proj), Some(guidance)) => x = x.add(&guidance.apply(proj)?)?,
            (None, Some(_)) => {
                candle_core::bail!("this UNet takes no guidance embedding (no time_cond_proj_dim)")
            }
            _ => {}
        }
        let activation = self.config.activation;
        x.apply(&self.linear_1)?
            .apply(&activation)?
            .apply(&self.linear_2)?
            .apply(&self.config.post.as_ref())?
            .apply(&self.config.last.as_ref())?
            .apply(&activation)
    }
}

/// diffusers' `get_timestep_embedding`: `[B, width]` f32 on the CPU; the last column of an odd width is 0.
fn sinusoidal(timesteps: &[i64], width: usize, config: &TimeEmbeddingConfig) -> Result<Tensor> {
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
