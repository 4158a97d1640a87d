//! Resuming: which checkpoint a run continues from, and whether it is of the same run.

use std::cmp::Ordering;
use std::fs;
use std::path::Path;

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};

use super::checkpoint::{self, CheckpointStore, OPTIMIZER, STATE, SavedRun, Saver};
use super::models_fingerprint::ModelsFingerprint;
use super::optimizer::AdamW;
use super::run::RunOptions;
use super::run_dir::RunDir;
use super::{Services, TrainError, io};
use crate::config::{Config, Difference, Resume, ResumeEffect, in_s3};
use crate::models::{UNetConfig, read_tensors};
use crate::pretrained::Models;
use crate::progress::Progress;

/// The checkpoint to resume from, if there is one.
pub(super) fn resume_from(
    options: &RunOptions<'_>,
    models: &ModelsFingerprint,
    saver: &Saver,
    output: &RunDir,
    services: &Services<'_>,
    progress: &Progress,
) -> Result<Option<SavedRun>, TrainError> {
    let (config, checkpoints) = (options.config, saver.checkpoints());
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
            let place = path.to_string_lossy();
            Some(fetch(&place, services, output.folder())?)
        }
        Resume::From(path) => {
            refuse_run_folder(path)?;
            Some(checkpoint::open(path)?)
        }
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
        announce(found, config.train.max_steps, progress)?;
        check_same_run(options, models, found, saver, output, progress)?;
    }
    Ok(found)
}

/// The checkpoint at `place`, which rank 0 chose and checked, for another rank.
pub(super) fn resume_from_place(
    config: &Config,
    place: &str,
    services: &Services<'_>,
) -> Result<SavedRun, TrainError> {
    if !in_s3(Path::new(place)) {
        return checkpoint::open(Path::new(place));
    }
    let scratch = config.train.scratch.clone();
    fetch(place, services, &scratch.unwrap_or_else(std::env::temp_dir))
}

/// Fetches the checkpoint at `place` in S3 into a new folder below `scratch`.
fn fetch(place: &str, services: &Services<'_>, scratch: &Path) -> Result<SavedRun, TrainError> {
    let place = place.trim_end_matches('/');
    let (parent, name) = place.rsplit_once('/').unwrap_or((place, ""));
    let parent = (services.destination)(parent)?;
    checkpoint::fetch(&parent, name, scratch)
}

/// Refuses the folder of a run in the place of one of its checkpoints.
fn refuse_run_folder(path: &Path) -> Result<(), TrainError> {
    if path.join(STATE).exists() {
        return Ok(());
    }
    let steps = CheckpointStore::in_folder(path, 1).steps()?;
    let what = match steps.last() {
        Some(step) => {
            let checkpoint = path.join(format!("checkpoint-{step}"));
            format!("name one of its checkpoints, as {}", checkpoint.display())
        }
        None if path.join("run.json").is_file() => {
            "it is the folder of a run without checkpoints".to_owned()
        }
        None => return Ok(()),
    };
    Err(TrainError::Mismatch(format!(
        "checkpoint.resume: {} is no checkpoint; {what}",
        path.display()
    )))
}

/// Says from which step the run goes on, or that it is finished; refuses a checkpoint beyond the last step.
fn announce(found: &SavedRun, max_steps: u64, progress: &Progress) -> Result<(), TrainError> {
    let (step, place) = (found.state.step, &found.place);
    match step.cmp(&max_steps) {
        Ordering::Less => progress.say(format!("going on from {place} (step {step})")),
        Ordering::Equal => progress.say(format!(
            "the run is finished: {place} is of its last step, {step}; raise train.max_steps to go on, or set another train.output for \
             another run"
        )),
        Ordering::Greater => {
            return Err(TrainError::Mismatch(format!(
                "{place} is of step {step}, and train.max_steps is {max_steps}; raise it to go on ({step} for the student of that step), or \
                 begin anew with another train.output"
            )));
        }
    }
    Ok(())
}

/// Refuses a configuration or models with which the run would make another student than so far, and warns of settings that were
/// changed.
fn check_same_run(
    options: &RunOptions<'_>,
    models: &ModelsFingerprint,
    found: &SavedRun,
    saver: &Saver,
    output: &RunDir,
    progress: &Progress,
) -> Result<(), TrainError> {
    let place = &found.place;
    let known = found.state.models.as_ref();
    let differences = options
        .config
        .differences(&found.state.configuration)
        .map_err(|error| TrainError::Checkpoint {
            path: place.into(),
            message: format!("its configuration can't be read: {error}"),
        })?;
    let mut other_settings = Vec::new();
    for Difference {
        key,
        was,
        now,
        effect,
    } in differences
    {
        let change = format!("{key} was {was} and is {now}");
        match effect {
            ResumeEffect::LaterSteps => progress.say(format!(
                "warning: {change}; the steps from here on are made with it"
            )),
            ResumeEffect::OtherPlaceOfModels if known.is_some() => {}
            ResumeEffect::OtherRun | ResumeEffect::OtherPlaceOfModels => {
                other_settings.push(change);
            }
        }
    }
    let mut other_models = other_models(options, models, found)?;
    if !other_models.is_empty() {
        // run.json names the commit of the models on the Hub.
        saver.records().fetch()?;
        other_models.extend(moved_teacher(
            output.folder(),
            options.config,
            options.models,
        ));
    }
    let what = match (other_settings.is_empty(), other_models.is_empty()) {
        (true, true) => {
            if known.is_none() {
                progress.say(format!(
                    "warning: {place} holds no fingerprint of the models, as none did in earlier versions: whether they are the same is \
                     known by their names alone; checkpoints from here on hold it"
                ));
            }
            return Ok(());
        }
        (false, true) => "another configuration",
        (true, false) => "other models",
        (false, false) => "another configuration and other models",
    };
    let contradictions = [other_settings, other_models].concat().join("; ");
    Err(TrainError::Mismatch(format!(
        "{place} is of a run with {what}: {contradictions}; restore that, or begin anew with another train.output"
    )))
}

/// Parts of the models that differ from those of the run of a checkpoint, with their files.
fn other_models(
    options: &RunOptions<'_>,
    now: &ModelsFingerprint,
    found: &SavedRun,
) -> Result<Vec<String>, TrainError> {
    let models = options.models;
    let unet = models.pipeline.join("unet");
    let student = found.folder.join("unet");
    let mut changes = Vec::new();
    // A LoRA has the teacher's network, of which the fingerprints tell.
    if student.is_dir() {
        let student = UNetConfig::read(&student)?;
        let teacher = UNetConfig::read(&unet)?;
        let keys = student.differences(&teacher);
        let value = |config: &UNetConfig, key: &str| {
            let value = config.to_json().get(key);
            value.map_or_else(|| "unset".to_owned(), ToString::to_string)
        };
        let described = keys.iter().map(|key| {
            let (was, now) = (value(&student, key), value(&teacher, key));
            format!("{key} was {was} and is {now}")
        });
        let described: Vec<String> = described.collect();
        if !described.is_empty() {
            changes.push(format!(
                "the network of the UNet ({}): {}",
                unet.join("config.json").display(),
                described.join(", ")
            ));
        }
    }
    if let Some(was) = &found.state.models {
        changes.extend(was.changes(now, models));
    }
    Ok(changes)
}

/// A remark if the teacher's branch on the Hub has moved since the run in this folder was last started.
pub(super) fn moved_teacher(output: &Path, config: &Config, models: &Models) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct LastStart {
        teacher: String,
        revision: String,
    }
    let text = bounded::read_text_file(&output.join("run.json"), MAX_FILE_BYTES).ok()?;
    let before: LastStart = serde_json::from_str(&text).ok()?;
    let (teacher, now) = (config.model.teacher.as_ref()?, models.commit.as_ref()?);
    let moved = before.teacher == teacher.as_str() && before.revision != *now;
    moved.then(|| {
        format!(
            "{teacher} is at commit {now} now, and was at {} when this run was last started; model.revision = \"{}\" \
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
    let current = std::env::current_dir().map_err(io(Path::new(".")))?;
    let description = serde_json::json!({
        "teacher": config.model.teacher,
        // The commit on the Hub: a branch moves.
        "revision": models.commit.as_ref().unwrap_or(&config.model.revision),
        "vae": config.model.vae,
        "objective": config.distill.objective,
        "tcd_gamma": config.distill.tcd_gamma,
        // Relative names of folders are relative to it.
        "started_in": current.to_string_lossy(),
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
    let wrong = |what: String| TrainError::Checkpoint {
        path: found.place.clone().into(),
        message: format!("the optimiser's state does not fit this run: {what}"),
    };
    let numbers = found.state.optimizer;
    if numbers.steps() > found.state.step {
        let (steps, step) = (numbers.steps(), found.state.step);
        return Err(wrong(format!("it made {steps} updates in {step} steps")));
    }
    let own = optimizer.state();
    let tensors = read_tensors(&path, |name| own.contains_key(name))
        .map_err(|error| wrong(format!("{OPTIMIZER}: {error}")))?;
    let tensors = tensors.into_iter();
    let tensors = tensors
        .map(|(name, tensor)| Ok((name, tensor.to_device(device)?)))
        .collect::<candle_core::Result<_>>()?;
    match optimizer.restore(&tensors, numbers)? {
        None => Ok(()),
        Some(what) => Err(wrong(what)),
    }
}
