//! The parts of a run: teacher, objective and student, as configuration and models say.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{DType, Device};

use super::TrainError;
use super::models_fingerprint::ModelsFingerprint;
use super::observers::TeacherSampler;
use super::run::RunOptions;
use crate::adaptation::{Adaptation, ForwardOptions, Full, Lora, LoraOptions};
use crate::config::{
    self, Config, LoraLayout, LossKind, MicroConditioning, MixedPrecision, ObjectiveKind, Uncond,
};
use crate::diffusion::{BoundaryScaling, DdimSolver, NoiseSchedule};
use crate::encode::{EncoderOptions, Encoders, ToldSizes, Unconditional};
use crate::models::{PipelineParts, UNet, UNetConfig, check_fit};
use crate::objective::{Distillation, Lcm, Loss, Objective, Pcm, Tcd};
use crate::ops::{self, Activations, Attention, NetworkAttention};

/// The frozen parts of a run.
#[derive(Debug)]
pub(super) struct RunParts {
    /// Encoders for pictures and figures, shared with the encode pool.
    pub(super) encoders: Arc<Encoders>,
    /// The teacher's network, whose weights a LoRA shares.
    pub(super) unet: UNet,
    /// The teacher.
    pub(super) teacher: TeacherSampler,
    pub(super) objective: Box<dyn Objective>,
    /// Shape of a latent, `[C, h, w]`.
    pub(super) latent: [usize; 3],
    pub(super) fingerprint: ModelsFingerprint,
    /// Which implementation computes each operation on the devices of training and encoding, for people.
    pub(super) implementations: Vec<String>,
}

impl RunParts {
    /// Loads the teacher and the encoders, and checks that they fit together. Their files are hashed at the same time.
    pub(super) fn load(options: &RunOptions<'_>) -> Result<Self, TrainError> {
        let models = options.models;
        std::thread::scope(|threads| {
            let hashing = threads.spawn(|| ModelsFingerprint::of(models));
            Self::load_networks(options, || match hashing.join() {
                Ok(hashed) => hashed,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    fn load_networks(
        options: &RunOptions<'_>,
        fingerprint: impl FnOnce() -> Result<ModelsFingerprint, TrainError>,
    ) -> Result<Self, TrainError> {
        let config = options.config;
        let pipeline = options.models.pipeline.as_path();
        let schedule = lcm_schedule(config, pipeline)?;
        let encode_device = options.encode_devices.first().unwrap_or(options.device);
        let encoders = Arc::new(load_encoders(options, encode_device)?);
        let teacher = load_teacher(config, pipeline, options.device)?;
        let vae = encoders.vae().config();
        check_fit(&PipelineParts {
            folder: pipeline,
            unet: teacher.config(),
            vae,
            text_width: encoders.text().width(),
            pooled_width: encoders.text().pooled_width(),
            resolution: config.image.resolution as usize,
        })?;
        let training = describe_training(config, options.device, teacher.config())
            .map(|how| format!("training on {}: {how}", config.train.device));
        let encoding = describe_encoders(&encoders)
            .map(|how| format!("encoding on {}: {how}", config.encode.devices[0]));
        let unconditional = unconditional(config, &encoders);
        let unconditional = encoders.unconditional(unconditional)?;
        let empty = encoders.encode_text(&[""])?.to_device(options.device)?;
        let side = config.image.resolution as usize / vae.downscale();
        let latent = [teacher.config().in_channels, side, side];
        let distill = &config.distill;
        let distillation = Distillation {
            solver: DdimSolver::new(&schedule, distill.num_ddim_timesteps),
            schedule: schedule.clone(),
            loss: match distill.loss {
                LossKind::Huber => Loss::Huber { c: distill.huber_c },
                LossKind::L2 => Loss::L2,
            },
            guidance: distill.w_min..distill.w_max,
            empty_prompts: distill.proportion_empty_prompts,
            empty,
            unconditional: unconditional.to_device(options.device)?,
            latent_scale: vae.scaling_factor,
        };
        let objective: Box<dyn Objective> = match distill.objective {
            ObjectiveKind::Lcm => Box::new(Lcm {
                distillation,
                boundary: BoundaryScaling {
                    timestep_scaling: distill.timestep_scaling,
                    ..BoundaryScaling::default()
                },
            }),
            ObjectiveKind::Tcd => Box::new(Tcd {
                distillation,
                gamma: distill.tcd_gamma(),
            }),
            ObjectiveKind::Pcm => Box::new(Pcm {
                distillation,
                phases: distill.phases(),
            }),
        };
        Ok(Self {
            encoders,
            teacher: TeacherSampler {
                denoiser: Rc::new(teacher.clone()),
                schedule,
            },
            unet: teacher,
            objective,
            latent,
            fingerprint: fingerprint()?,
            implementations: training.into_iter().chain(encoding).collect(),
        })
    }
}

/// `distill.uncond` for a pipeline.
fn unconditional(config: &Config, encoders: &Encoders) -> Unconditional {
    match config.distill.uncond {
        Uncond::Auto => encoders.text().own_unconditional(),
        Uncond::Empty => Unconditional::Empty,
        Uncond::Zeros => Unconditional::Zeros,
    }
}

/// `[encode]` and `data.micro_conditioning` as the encoders take them.
pub(crate) fn encoder_options(config: &Config) -> EncoderOptions {
    let Config { encode, data, .. } = config;
    EncoderOptions {
        told_sizes: match data.micro_conditioning {
            MicroConditioning::Image => ToldSizes::Own,
            MicroConditioning::Fixed => ToldSizes::Uncropped,
        },
        vae_batch: encode.batch_size,
        vae_dtype: encode.vae_dtype.into(),
        text_dtype: encode.dtype.into(),
    }
}

/// Encoders of the run's models on `device`.
pub(super) fn load_encoders(
    options: &RunOptions<'_>,
    device: &Device,
) -> Result<Encoders, TrainError> {
    let models = options.models;
    Ok(Encoders::load(
        &models.pipeline,
        models.vae.as_deref(),
        device,
        encoder_options(options.config),
    )?)
}

/// How a device other than the CPU computes a training step of the network `unet`.
pub(crate) fn describe_training(
    config: &Config,
    device: &Device,
    unet: &UNetConfig,
) -> Option<String> {
    let unet = NetworkAttention {
        network: "UNet",
        kind: config.train.attention,
        widths: unet.head_widths(),
    };
    ops::describe(device, &[unet], true)
}

/// How their device computes `encoders`, unless it is the CPU.
pub(crate) fn describe_encoders(encoders: &Encoders) -> Option<String> {
    let attention = |network, widths| NetworkAttention {
        network,
        kind: Attention::MemoryEfficient,
        widths,
    };
    let vae = encoders.vae().config().head_width();
    let networks = [
        attention("text encoder", encoders.text().head_widths()),
        attention("VAE", Vec::from_iter(vae)),
    ];
    ops::describe(encoders.device(), &networks, false)
}

fn load_teacher(config: &Config, pipeline: &Path, device: &Device) -> Result<UNet, TrainError> {
    let dtype = config.train.teacher_dtype.into();
    let teacher = UNet::load(
        &pipeline.join("unet"),
        dtype,
        device,
        config.train.attention,
    )?;
    Ok(teacher.computing_in(compute_dtype(config)))
}

/// The student of a run: that of `checkpoint` if there is one, else a new one from the teacher, whose network is `unet`.
pub(super) fn load_student(
    options: &RunOptions<'_>,
    unet: &UNet,
    checkpoint: Option<&Path>,
) -> Result<Box<dyn Adaptation>, TrainError> {
    let config = options.config;
    let forward = ForwardOptions {
        attention: config.train.attention,
        activations: if config.train.gradient_checkpointing {
            Activations::Recompute
        } else {
            Activations::Keep
        },
        compute: compute_dtype(config),
    };
    let (seed, device) = (config.train.seed, options.device);
    if let Some(lora) = &config.lora {
        let lora = lora_options(lora);
        return Ok(Box::new(match checkpoint {
            Some(folder) => Lora::load(folder, unet, lora, seed, device, forward)?,
            None => Lora::from_teacher(unet, lora, seed, device, forward)?,
        }));
    }
    let student = match checkpoint {
        Some(folder) => Full::load(folder, device, forward),
        None => Full::from_teacher(
            &options.models.pipeline.join("unet"),
            config.model.time_cond_proj_dim(),
            seed,
            device,
            forward,
        ),
    };
    Ok(Box::new(student?))
}

/// `[lora]` as the student takes it.
fn lora_options(lora: &config::Lora) -> LoraOptions {
    LoraOptions {
        rank: lora.rank,
        alpha: lora.alpha(),
        dropout: lora.dropout,
        targets: lora.targets.clone(),
        save_peft: lora.save.contains(&LoraLayout::Peft),
        save_kohya: lora.save.contains(&LoraLayout::Kohya),
        save_dtype: lora.save_dtype.into(),
    }
}

/// Type to compute in, where it is not that of the weights.
pub(crate) fn compute_dtype(config: &Config) -> Option<DType> {
    match config.train.mixed_precision {
        MixedPrecision::No => None,
        MixedPrecision::Fp16 => Some(DType::F16),
        MixedPrecision::Bf16 => Some(DType::BF16),
    }
}

/// The teacher's noise schedule, if `distill.num_ddim_timesteps` divides it.
pub(crate) fn lcm_schedule(config: &Config, pipeline: &Path) -> Result<NoiseSchedule, TrainError> {
    let solver_steps = config.distill.num_ddim_timesteps;
    let schedule = NoiseSchedule::read(&pipeline.join("scheduler"))?;
    if schedule.len().is_multiple_of(solver_steps) {
        return Ok(schedule);
    }
    Err(TrainError::Mismatch(format!(
        "distill.num_ddim_timesteps = {solver_steps} does not divide the teacher's {} timesteps",
        schedule.len()
    )))
}
