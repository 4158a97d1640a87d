//! The observers of a run.

use std::rc::Rc;
use std::sync::Arc;

use coffey_pipeline::SkippedSample;
use coffey_pipeline::flow::Recent;

use super::checkpoint::{RunIdentity, Saver};
use super::observers::{
    AuditWriter, Checkpoints, Comparison, ComparisonGrid, Console, Endpoint, EndpointError, Grids,
    LossCurve, MetricsLog, MonitorReporter, SkippedLog, TrackedRun, figure, list_skipped,
};
use super::parts::RunParts;
use super::resume::{describe_run, moved_teacher};
use super::run::RunOptions;
use super::run_dir::RunDir;
use super::{Observer, Observers, Services, TrainError, TrainState};
use crate::config::Resume;
use crate::encode::EncodeError;
use crate::progress::Progress;
use crate::sample::Prompts;

/// The observers of a run, in the order in which they see a step.
pub(super) fn run_observers(
    options: &RunOptions<'_>,
    services: &Services<'_>,
    parts: &RunParts,
    output: &RunDir,
    saver: &Rc<Saver>,
    state: &TrainState,
    progress: Rc<Progress>,
) -> Result<Observers, TrainError> {
    let RunOptions { config, models, .. } = options;
    let (folder, monitor) = (output.folder(), &services.monitor);
    let max_steps = config.train.max_steps;
    // The steps before another run's checkpoint are in the records of that run.
    let elsewhere = matches!(config.checkpoint.resume, Resume::From(_));
    let (metrics_log, records) =
        MetricsLog::open(folder, state.step, elsewhere, Rc::clone(&progress))?;
    monitor.resume(records.iter().map(Into::into));
    let shards = services.shards.clone();
    let mut skipped_log =
        SkippedLog::open(folder, state.step, elsewhere, shards, Rc::clone(&progress))?;
    let configuration = config
        .to_toml()
        .map_err(|error| TrainError::Mismatch(error.to_string()))?;
    let tracked = TrackedRun {
        folder,
        place: output.place(),
        step: state.step,
        records: &records,
        configuration: &configuration,
        progress: &progress,
    };
    let trackers = tracked.open(&config.track);
    if state.step > 0
        && let Some(warning) = moved_teacher(folder, config, models)
    {
        progress.say(format!("warning: {warning}"));
    }
    describe_run(folder, config, models, &configuration)?;

    let mut observers = Observers::default();
    observers.push(Console {
        progress: Rc::clone(&progress),
        max_steps,
        skipped: skipped_log.counts(),
        metrics: monitor.flow().clone(),
        recent: Recent::default(),
        begun: None,
        waiting: None,
    });
    if let (Some(audit), 0) = (&config.audit, state.step) {
        let folder = (services.destination)(&audit.dir.to_string_lossy())?;
        let steps = audit.steps.min(max_steps);
        let student = &*state.student;
        let audit = AuditWriter::start(folder, steps, config, &*parts.objective, student)?;
        observers.push(audit);
    }
    let mut skipped = Vec::new();
    let endpoint = endpoint_error(options, services, parts, &progress, &mut skipped);
    if let Err(TrainError::Encode(EncodeError::Stream(_))) = &endpoint {
        let listed = || skipped_log.on_failed(state.step + 1, &skipped);
        list_skipped(&skipped, listed, saver, output.place(), &progress);
    }
    let endpoint = endpoint?;
    if let Some(error) = &endpoint {
        observers.push(Endpoint {
            error: Rc::clone(error),
            every: config.report.endpoint_every,
            max_steps,
            progress: Rc::clone(&progress),
        });
    }
    observers.push(skipped_log);
    observers.push(metrics_log);
    let reporter = MonitorReporter {
        monitor: monitor.clone(),
        folder: folder.to_owned(),
        max_steps,
    };
    if let Some(validation) = &config.validation {
        reporter.show_grid(state.step - state.step % validation.every);
    }
    observers.push(reporter);
    for tracker in trackers {
        observers.push(tracker);
    }
    observers.push(Checkpoints {
        saver: Rc::clone(saver),
        every: config.checkpoint.every,
        background: config.checkpoint.background,
        max_steps,
        identity: RunIdentity {
            configuration,
            models: parts.fingerprint.clone(),
        },
        output: output.place().to_owned(),
        newest: (state.step > 0).then_some(state.step),
        monitor: monitor.clone(),
        progress: Rc::clone(&progress),
    });
    observers.push(LossCurve {
        folder: folder.to_owned(),
        records,
        endpoint: endpoint.clone(),
        progress: Rc::clone(&progress),
    });
    let prompts = |captions: &[String], repeats, purpose| {
        let (seed, latent) = (config.train.seed, parts.latent);
        let encoders = &parts.encoders;
        Prompts::new(
            encoders,
            captions,
            repeats,
            latent,
            seed,
            purpose,
            options.device,
        )
    };
    let mut grid = None;
    if let Some(validation) = &config.validation {
        let repeats = validation.images_per_prompt;
        observers.push(Grids {
            folder: folder.to_owned(),
            validation: validation.clone(),
            prompts: prompts(&validation.prompts, repeats, "validation")?,
            encoders: Arc::clone(&parts.encoders),
            progress: Rc::clone(&progress),
        });
        if config.report.grid {
            grid = Some(ComparisonGrid {
                folder: folder.to_owned(),
                prompts: prompts(&validation.prompts, 1, "comparison")?,
                labels: validation.prompts.clone(),
                guidance: config.report.guidance,
                teacher: parts.teacher.clone(),
                encoders: Arc::clone(&parts.encoders),
            });
        }
    }
    observers.push(Comparison {
        grid,
        endpoint,
        progress,
    });
    Ok(observers)
}

/// The endpoint error, with the teacher's samples drawn; `None` where it is off.
fn endpoint_error(
    options: &RunOptions<'_>,
    services: &Services<'_>,
    parts: &RunParts,
    progress: &Progress,
    skipped: &mut Vec<SkippedSample>,
) -> Result<Option<Rc<EndpointError>>, TrainError> {
    let config = options.config;
    let wanted = config.report.endpoint_captions;
    if wanted == 0 {
        return Ok(None);
    }
    progress.say(format!(
        "drawing the teacher's endpoints of {wanted} captions"
    ));
    let captions = services.first_captions(wanted, skipped)?;
    let (seed, latent, device) = (config.train.seed, parts.latent, options.device);
    let prompts = Prompts::new(
        &parts.encoders,
        &captions,
        1,
        latent,
        seed,
        "endpoint",
        device,
    )?;
    let guidance = config.report.guidance;
    let error = EndpointError::new(
        prompts,
        guidance,
        &parts.teacher,
        &services.cancel,
        progress,
    )?;
    progress.say(format!(
        "endpoint error of the teacher: {} in 1 step, {} in 4 steps",
        figure(error.teacher_1_step),
        figure(error.teacher_4_steps)
    ));
    Ok(Some(Rc::new(error)))
}
