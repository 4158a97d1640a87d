//! Resuming: which checkpoint a run continues from, and whether it is of the same run.

use std::fs;
use std::path::Path;

use super::checkpoint::{self, CheckpointStore, OPTIMIZER, SavedRun};
use super::optimizer::AdamW;
use super::run_dir::RunDir;
use super::{Services, TrainError, io};
use crate::config::{Config, Difference, Resume, ResumeEffect, in_s3};
use crate::pretrained::Models;
use crate::progress::Progress;

/// The checkpoint to resume from, if there is one.
pub(super) fn resume_from(
    config: &Config,
    checkpoints: &CheckpointStore,
    output: &RunDir,
    services: &Services<'_>,
    progress: &Progress,
) -> Result<Option<SavedRun>, TrainError> {
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
            let parent = (services.destination)(parent)?;
            Some(checkpoint::fetch(&parent, name, output.folder())?)
        }
        Resume::From(path) => Some(checkpoint::open(path)?),
        Resume::Latest => {
            let (found, mut damaged) = checkpoints.newest_whole()?;
            // Starting over would overwrite a run that can perhaps be repaired.
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

/// Refuses a configuration with which the run would make another student than so far, and warns of settings that were changed.
fn check_same_run(
    config: &Config,
    found: &SavedRun,
    progress: &Progress,
) -> Result<(), TrainError> {
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
    let describe = |difference: &Difference| {
        let Difference { key, was, now, .. } = difference;
        format!("{key} was {was} and is {now}")
    };
    for change in &changes {
        progress.say(format!(
            "warning: {}; the steps from here on are made with it",
            describe(change)
        ));
    }
    if contradictions.is_empty() {
        return Ok(());
    }
    let contradictions: Vec<String> = contradictions.iter().map(describe).collect();
    Err(TrainError::Mismatch(format!(
        "{place} is of a run with another configuration: {}; restore that, or begin anew with another train.output",
        contradictions.join("; ")
    )))
}

/// A warning if the teacher's branch on the Hub has moved since the run in this folder was last started.
pub(super) fn moved_teacher(output: &Path, config: &Config, models: &Models) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct LastStart {
        teacher: String,
        revision: String,
    }
    let text = fs::read_to_string(output.join("run.json")).ok()?;
    let before: LastStart = serde_json::from_str(&text).ok()?;
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

/// Writes `run.json` and `config.toml`, from which `coffey sample` finds a run's teacher.
pub(super) fn describe_run(
    output: &Path,
    config: &Config,
    models: &Models,
    configuration: &str,
) -> Result<(), TrainError> {
    let description = serde_json::json!({
        "teacher": config.model.teacher,
        // The commit on the Hub: a branch moves.
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

/// Restores the optimiser from a checkpoint.
pub(super) fn restore_optimizer(
    found: &SavedRun,
    optimizer: &mut AdamW,
    device: &candle_core::Device,
) -> Result<(), TrainError> {
    let path = found.folder.join(OPTIMIZER);
    let tensors = candle_core::safetensors::load(path, device)?;
    match optimizer.restore(&tensors, found.state.optimizer)? {
        None => Ok(()),
        Some(wrong) => Err(TrainError::Checkpoint {
            path: found.place.clone().into(),
            message: format!("{OPTIMIZER}: {wrong}"),
        }),
    }
}
