//! `[model]`, `[encode]` and `[distill]`: the teacher, the encoders' devices, and the objective.

use serde::{Deserialize, Serialize};

use super::model_ref::ModelRef;
use super::values::{DeviceSpec, FloatType, LossKind};

/// `[model]`: what is distilled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// The teacher in diffusers layout: a folder, an `s3://` prefix or a Hub id; every command that loads a model needs it.
    /// `--pretrained_teacher_model`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<ModelRef>,
    /// Branch, tag or commit of a teacher on the Hub. `--teacher_revision`
    pub revision: String,
    /// Another VAE, named as the teacher is; the teacher's when unset. `--pretrained_vae_model_name_or_path`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<ModelRef>,
    /// Width of the student's guidance embedding, where the teacher has none of its own.
    /// `--unet_time_cond_proj_dim`
    pub time_cond_proj_dim: usize,
}

impl Model {
    /// The branch every repository of the Hub has.
    pub const MAIN: &str = "main";
}

impl Default for Model {
    fn default() -> Self {
        Self {
            teacher: None,
            revision: Self::MAIN.to_owned(),
            vae: None,
            time_cond_proj_dim: 256,
        }
    }
}

/// `[encode]`: the pool that turns pixels and captions into latents and embeddings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Encode {
    /// One worker for each entry; a device may be named more than once. No flag.
    pub devices: Vec<DeviceSpec>,
    /// Images the VAE encodes at once; on the CPU at most. `--vae_encode_batch_size`
    pub batch_size: usize,
    /// Type the text encoder runs in. Follows `--mixed_precision` in the reference.
    pub dtype: FloatType,
    /// Type the VAE runs in. Follows `--mixed_precision` in the reference.
    pub vae_dtype: FloatType,
}

impl Default for Encode {
    fn default() -> Self {
        Self {
            devices: vec![DeviceSpec::Cpu],
            batch_size: 32,
            dtype: FloatType::F32,
            vae_dtype: FloatType::F32,
        }
    }
}

/// `[distill]`: the latent consistency objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Distill {
    /// Points of the DDIM solver over the teacher's 1000 timesteps. `--num_ddim_timesteps`
    pub num_ddim_timesteps: usize,
    /// Least guidance drawn. `--w_min`
    pub w_min: f64,
    /// Greatest guidance drawn. `--w_max`
    pub w_max: f64,
    /// The loss. `--loss_type`
    pub loss: LossKind,
    /// The Huber loss's c. `--huber_c`
    pub huber_c: f64,
    /// Factor on the timestep in the boundary scalings. `--timestep_scaling_factor`
    pub timestep_scaling: f64,
    /// Share of the target UNet kept at each step, 0 to 1. `--ema_decay`
    pub ema_decay: f64,
    /// Share of captions replaced by the empty one, 0 to 1. `--proportion_empty_prompts`
    pub proportion_empty_prompts: f64,
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            num_ddim_timesteps: 50,
            w_min: 5.0,
            w_max: 15.0,
            loss: LossKind::Huber,
            huber_c: 0.001,
            timestep_scaling: 10.0,
            ema_decay: 0.95,
            proportion_empty_prompts: 0.0,
        }
    }
}
