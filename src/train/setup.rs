//! What a run is made of, checked before anything is trained.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::checkpoint::{self, Checkpoints};
use super::progress::Progress;
use super::{Distillation, Loss, TrainError, io};
use crate::config::{Config, LossKind, Resume};
use crate::diffusion::{BoundaryScaling, DdimSolver, NoiseSchedule};
use crate::encode::Encoders;
use crate::models::UNetConfig;

/// The step's pieces, as the teacher's scheduler and the configuration say.
pub(crate) fn distillation(config: &Config, pipeline: &Path) -> Result<Distillation, TrainError> {
    let distill = &config.distill;
    let schedule = NoiseSchedule::read(&pipeline.join("scheduler"))?;
    if !schedule.len().is_multiple_of(distill.num_ddim_timesteps) {
        return Err(TrainError::Mismatch(format!(
            "distill.num_ddim_timesteps = {} does not divide the teacher's {} timesteps",
            distill.num_ddim_timesteps,
            schedule.len()
        )));
    }
    Ok(Distillation {
        solver: DdimSolver::new(&schedule, distill.num_ddim_timesteps),
        schedule,
        boundary: BoundaryScaling {
            timestep_scaling: distill.timestep_scaling,
            ..BoundaryScaling::default()
        },
        loss: match distill.loss {
            LossKind::Huber => Loss::Huber { c: distill.huber_c },
            LossKind::L2 => Loss::L2,
        },
    })
}

/// Whether the parts of a pipeline belong together.
pub(crate) fn check_fit(
    unet: &UNetConfig,
    encoders: &Encoders,
    config: &Config,
    pipeline: &Path,
) -> Result<(), TrainError> {
    let mismatch = |what: String| {
        Err(TrainError::Mismatch(format!(
            "{}: {what}",
            pipeline.display()
        )))
    };
    if unet.cross_attention_dim != encoders.text_width() {
        return mismatch(format!(
            "the text encoder makes embeddings of width {}, the UNet's cross_attention_dim is {}",
            encoders.text_width(),
            unet.cross_attention_dim
        ));
    }
    let vae = encoders.vae().config();
    if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        return mismatch(format!(
            "the autoencoder's latents have {} channels, the UNet takes {} and makes {}",
            vae.latent_channels, unet.in_channels, unet.out_channels
        ));
    }
    let (side, needed) = (config.image.resolution, vae.downscale());
    if !side.is_multiple_of(needed) {
        return mismatch(format!(
            "image.resolution = {side} must be a multiple of {needed} for this autoencoder"
        ));
    }
    Ok(())
}

/// The checkpoint to go on from, if there is one.
pub(super) fn resume_from(
    config: &Config,
    checkpoints: &Checkpoints,
    output: &Path,
    progress: &Progress,
) -> Result<Option<checkpoint::Found>, TrainError> {
    let found = match &config.checkpoint.resume {
        Resume::Never => match checkpoints.steps()?.last() {
            None => None,
            Some(step) => {
                return Err(TrainError::Mismatch(format!(
                    "{}: checkpoint.resume is \"never\" but the folder holds checkpoint-{step}; set another \
                     train.output, or move the checkpoints away",
                    output.display()
                )));
            }
        },
        Resume::From(path) => Some((path.clone(), checkpoint::open(path)?)),
        Resume::Latest => {
            let (found, mut damaged) = checkpoints.newest_whole()?;
            // Starting over would overwrite a run that someone may still repair.
            if found.is_none()
                && let Some(error) = damaged.pop()
            {
                return Err(error);
            }
            for error in damaged {
                progress.say(format!("passed over: {error}"));
            }
            found
        }
    };
    if let Some((path, state)) = &found {
        progress.say(format!(
            "going on from {} (step {})",
            path.display(),
            state.step
        ));
    }
    Ok(found)
}

/// Takes the output folder for this process, until the file is closed: two runs in one folder would destroy each other's
/// checkpoints.
pub(super) fn lock(output: &Path) -> Result<File, TrainError> {
    let path = output.join(".lock");
    let file = File::create(&path).map_err(io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::Mismatch(format!(
            "{}: another process is training into this folder",
            output.display()
        ))),
        Err(TryLockError::Error(source)) => Err(io(&path)(source)),
    }
}

/// `run.json` and `config.toml`: what `coffey sample` and people need to know of a run.
pub(super) fn describe_run(
    output: &Path,
    config: &Config,
    configuration: &str,
) -> Result<(), TrainError> {
    let description = serde_json::json!({
        "teacher": config.model.teacher,
        "vae": config.model.vae,
        "coffey": env!("CARGO_PKG_VERSION"),
    });
    for (name, text) in [
        ("run.json", format!("{description:#}\n")),
        ("config.toml", configuration.to_owned()),
    ] {
        let path = output.join(name);
        fs::write(&path, text).map_err(io(&path))?;
    }
    Ok(())
}
