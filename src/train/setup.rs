//! What a run is made of, checked before anything is trained.

use std::fs;
use std::path::Path;

use super::checkpoint::{self, Checkpoints, Found};
use super::data::Data;
use super::output::Output;
use super::progress::Progress;
use super::{Distillation, Loss, TrainError, io};
use crate::config::{Config, Difference, LossKind, Resume, ResumeEffect, in_s3};
use crate::diffusion::{BoundaryScaling, DdimSolver, NoiseSchedule};
use crate::encode::Encoders;
use crate::models::UNetConfig;
use crate::pretrained::Models;

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
    let (side, needed) = (config.image.resolution as usize, vae.downscale());
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
    output: &Output,
    data: &Data<'_>,
    progress: &Progress,
) -> Result<Option<Found>, TrainError> {
    let found = match &config.checkpoint.resume {
        Resume::Never => match checkpoints.steps()?.last() {
            None => None,
            Some(step) => {
                return Err(TrainError::Mismatch(format!(
                    "{}: checkpoint.resume is \"never\" but checkpoint-{step} is there; set another train.output, or move the \
                     checkpoints away",
                    output.place().display()
                )));
            }
        },
        Resume::From(path) if in_s3(path) => {
            let path = path.to_string_lossy();
            let path = path.trim_end_matches('/');
            let (parent, name) = path.rsplit_once('/').unwrap_or((path, ""));
            let parent = (data.destination)(parent)?;
            Some(checkpoint::fetch(&parent, name, output.folder())?)
        }
        Resume::From(path) => Some(checkpoint::open(path)?),
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
    if let Some(found) = &found {
        progress.say(format!(
            "going on from {} (step {})",
            found.place, found.state.step
        ));
        check_same_run(config, found, progress)?;
    }
    Ok(found)
}

/// Refuses a configuration that would make another run of the one that `found` is of, and says what was turned on the way.
fn check_same_run(config: &Config, found: &Found, progress: &Progress) -> Result<(), TrainError> {
    let place = &found.place;
    let differences = config
        .differences(&found.state.configuration)
        .map_err(|error| TrainError::Checkpoint {
            path: place.into(),
            message: format!("its configuration can't be read: {error}"),
        })?;
    let (contradictions, changes): (Vec<_>, Vec<_>) = differences
        .into_iter()
        .partition(|difference| difference.effect == ResumeEffect::OtherRun);
    let told = |difference: &Difference| {
        let Difference { key, was, now, .. } = difference;
        format!("{key} was {was} and is {now}")
    };
    for change in &changes {
        progress.say(format!(
            "warning: {}; the steps from here on are made with it",
            told(change)
        ));
    }
    if contradictions.is_empty() {
        return Ok(());
    }
    let contradictions: Vec<String> = contradictions.iter().map(told).collect();
    Err(TrainError::Mismatch(format!(
        "{place} is of a run with another configuration: {}; restore that, or begin anew with another train.output",
        contradictions.join("; ")
    )))
}

/// Says so if the teacher's branch on the Hub has moved since the run in this folder was last started.
pub(super) fn moved_teacher(output: &Path, config: &Config, models: &Models) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Before {
        teacher: String,
        revision: String,
    }
    let text = fs::read_to_string(output.join("run.json")).ok()?;
    let before: Before = serde_json::from_str(&text).ok()?;
    let (teacher, now) = (config.model.teacher.as_ref()?, models.commit.as_ref()?);
    let moved = before.teacher == teacher.as_str() && before.revision != *now;
    moved.then(|| {
        format!(
            "warning: {teacher} is at commit {now} now, and was at {} when this run was last started; model.revision = \"{}\" \
             goes on with the same teacher",
            before.revision, before.revision
        )
    })
}

/// `run.json` and `config.toml`: what `coffey sample` and people need to know of a run.
pub(super) fn describe_run(
    output: &Path,
    config: &Config,
    models: &Models,
    configuration: &str,
) -> Result<(), TrainError> {
    let description = serde_json::json!({
        "teacher": config.model.teacher,
        // Which of the Hub's commits it was: a branch moves.
        "revision": models.commit.as_ref().unwrap_or(&config.model.revision),
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
