//! A run: from the stream of batches to a finished student.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use coffey_pipeline::SkippedSample;
use coffey_pipeline::flow::StageHandle;
use coffey_pipeline::order::{Cursor, Lanes};
use coffey_pipeline::stages::Stage;

use super::checkpoint::Saver;
use super::not_finite::with_advice;
use super::observers::list_skipped;
use super::parts::{RunParts, load_encoders, load_student};
use super::resume::{restore_optimizer, resume_from, resume_from_place};
use super::run_dir::RunDir;
use super::run_observers::run_observers;
use super::same_run::SameRun;
use super::{
    AdamW, Ending, Observers, RunView, Services, StepOptions, TrainError, TrainState, Trainer,
    TrainerOptions,
};
use crate::config::{Config, MixedPrecision, TextFrom};
use crate::encode::{EncodeError, EncodePool, EncodedBatch, Encoders};
use crate::pretrained::Models;
use crate::progress::{Progress, ProgressOptions};
use crate::ranks::{Job, Patience};

/// Inputs of a run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The models that the configuration names.
    pub models: &'a Models,
    /// Device of teacher and student.
    pub device: &'a Device,
    /// Devices of the encoders, one a thread.
    pub encode_devices: &'a [Device],
    /// The ranks that make the run together.
    pub job: &'a Job,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are made. Rank 0 has left the finished student in this folder; `None` on the others.
    Done(Option<PathBuf>),
    /// A stop was asked for; a checkpoint of the last step is saved.
    Stopped,
}

/// Distils into `output` as a configuration says. `docs/formats.md` describes what is left there. Rank 0 has the output; the other ranks
/// make their part of each step and write nothing.
///
/// # Errors
/// [`TrainError`]; an error never damages a checkpoint that was saved before.
pub fn run(
    options: &RunOptions<'_>,
    services: &Services<'_>,
    output: Option<RunDir>,
) -> Result<Outcome, TrainError> {
    let progress = Rc::new(Progress::new(ProgressOptions {
        total: options.config.train.max_steps,
        template: "{spinner} [{elapsed}] {wide_bar} {pos}/{len} {msg}",
        line_every: Duration::from_secs(5),
    }));
    match Run::prepare(options, services, output, progress).and_then(Run::drive) {
        Err(TrainError::Stopped) => Ok(Outcome::Stopped),
        outcome => outcome,
    }
}

/// A run, loaded and checked.
struct Run<'a> {
    options: &'a RunOptions<'a>,
    services: &'a Services<'a>,
    encoders: Arc<Encoders>,
    lanes: Lanes,
    trainer: Trainer,
    progress: Rc<Progress>,
    /// The output and its writers, on rank 0; `None` on the other ranks.
    records: Option<Records>,
}

/// The output of a run with its writers.
struct Records {
    observers: Observers,
    saver: Rc<Saver>,
    /// Declared last: the lock on the output must outlive the saver.
    output: RunDir,
}

impl<'a> Run<'a> {
    /// Loads and checks everything, and resumes from a checkpoint if there is one.
    fn prepare(
        options: &'a RunOptions<'a>,
        services: &'a Services<'a>,
        output: Option<RunDir>,
        progress: Rc<Progress>,
    ) -> Result<Self, TrainError> {
        let config = options.config;
        let collective = Rc::clone(&options.job.collective);
        let timeout = Duration::from_secs(config.train.stall_timeout);
        let same_run = same_run(options);
        same_run.check_configuration(config)?;
        let pipeline = options.models.pipeline.display();
        progress.say(format!("loading encoders and teacher from {pipeline}"));
        let parts = RunParts::load(options)?;
        for how in &parts.implementations {
            progress.say(how);
        }
        let output = output.map(|output| {
            let saver = Saver::new(&output, config.checkpoint.keep);
            (Rc::new(saver), output)
        });
        let written = output.as_ref().map(|(saver, output)| (&**saver, output));
        let state = load_state(options, services, &parts, written, &progress)?;
        same_run.check_equal("models", &parts.fingerprint)?;
        same_run.check_weights(&state)?;
        let lanes = run_lanes(options, services.shards.len(), &state)?;
        if lanes.count > 1 {
            progress.say(format!("{} lanes of the data", lanes.count));
        }
        let records = match output {
            None => None,
            Some((saver, output)) => {
                let shown = Rc::clone(&progress);
                let observers =
                    run_observers(options, services, &parts, &output, &saver, &state, shown)?;
                Some(Records {
                    observers,
                    saver,
                    output,
                })
            }
        };
        let trainer = Trainer::new(
            parts.objective,
            parts.teacher.denoiser,
            state,
            collective,
            TrainerOptions {
                seed: config.train.seed,
                max_steps: config.train.max_steps,
                lanes: lanes.clone(),
                rank_timeout: timeout,
                ema_decay: config.distill.ema_decay(),
                optimizer: config.optimizer.clone(),
            },
            services.monitor.flow().stage(Stage::Train),
        );
        Ok(Self {
            options,
            services,
            encoders: parts.encoders,
            lanes,
            trainer,
            progress,
            records,
        })
    }

    /// Makes the steps that are left and ends the run.
    fn drive(mut self) -> Result<Outcome, TrainError> {
        let ending = if self.trainer.state().step < self.options.config.train.max_steps {
            self.steps()?
        } else {
            Ending::Done
        };
        // The last step is saved.
        self.trainer.gather_moments()?;
        let Some(mut records) = self.records else {
            return Ok(match ending {
                Ending::Done => Outcome::Done(None),
                Ending::Stopped => Outcome::Stopped,
            });
        };
        let (trainer, cancel) = (&self.trainer, &self.services.cancel);
        records.observers.on_end(ending, &view(trainer, cancel))?;
        if ending == Ending::Stopped {
            return Ok(Outcome::Stopped);
        }
        let step = self.trainer.state().step;
        records.saver.records().upload().map_err(|cause| {
            TrainError::not_saved("metrics and pictures".to_owned(), cause, Some(step))
        })?;
        let place = records.output.place().to_owned();
        records.output.close();
        Ok(Outcome::Done(Some(place)))
    }

    /// Feeds the trainer from a stream until all steps are made or a stop is asked for.
    fn steps(&mut self) -> Result<Ending, TrainError> {
        let (train, cancel) = (&self.options.config.train, &self.services.cancel);
        let state = self.trainer.state();
        let stream =
            (self.services.open)(train.batch_size, self.lanes.clone(), state.cursor.clone())?;
        let monitor = &self.services.monitor;
        let encoders = pool_encoders(self.options, &self.encoders)?;
        let pool = EncodePool::start(stream, encoders, monitor.flow(), &self.services.runtime)?;
        let mut batches = Batches {
            pool,
            stage: monitor.flow().stage(Stage::Train),
            services: self.services,
            stall_timeout: Duration::from_secs(train.stall_timeout),
            skipped: Vec::new(),
        };
        if let Some(records) = &mut self.records {
            records.observers.on_start(&view(&self.trainer, cancel))?;
        }
        while self.trainer.state().step < train.max_steps {
            let step = self.trainer.state().step + 1;
            let observers = self.records.as_ref().map(|records| &records.observers);
            let options = StepOptions {
                cancel,
                keep_traces: observers.is_some_and(|observers| observers.wants_traces(step)),
            };
            batches.skipped.clear();
            let mut report = match self.trainer.step(&mut || batches.next(step), options) {
                Ok(report) => report,
                Err(TrainError::Stopped) => return Ok(Ending::Stopped),
                Err(error) => return Err(self.failed(step, error, batches)),
            };
            if step.is_multiple_of(self.options.config.checkpoint.every) {
                same_run(self.options).check_weights(self.trainer.state())?;
                self.trainer.gather_moments()?;
            }
            if let Some(records) = &mut self.records {
                if let Some(lock) = records.output.prefix_lock() {
                    lock.check(false)?;
                }
                let run = view(&self.trainer, cancel);
                records.observers.on_step(&mut report, &run)?;
            }
            self.trainer.release_moments();
            monitor.heartbeat();
            if report.stop && step < train.max_steps {
                return Ok(Ending::Stopped);
            }
        }
        Ok(Ending::Done)
    }

    /// The error of a step with advice, after the samples that were skipped before it are recorded.
    fn failed(&mut self, step: u64, error: TrainError, mut batches: Batches<'_>) -> TrainError {
        let Some(records) = &mut self.records else {
            return error;
        };
        let mut skipped = std::mem::take(&mut batches.skipped);
        skipped.extend(batches.pool.stream().take_undelivered().skipped);
        let Records {
            observers,
            saver,
            output,
        } = records;
        let listed = || observers.on_failed(step, &skipped);
        list_skipped(&skipped, listed, saver, output.place(), &self.progress);
        with_advice(error, self.options.config, saver)
    }
}

/// The comparison of the ranks, which load models at different speeds: each waits while the others live.
fn same_run<'a>(options: &RunOptions<'a>) -> SameRun<'a> {
    let limit = Duration::from_secs(options.config.train.stall_timeout);
    SameRun {
        collective: &*options.job.collective,
        patience: Patience::ForLife(limit),
    }
}

fn view<'a>(trainer: &'a Trainer, cancel: &'a tokio_util::sync::CancellationToken) -> RunView<'a> {
    RunView {
        state: trainer.state(),
        objective: trainer.objective(),
        cancel,
    }
}

/// The batches of a run.
struct Batches<'a> {
    pool: EncodePool,
    stage: StageHandle,
    services: &'a Services<'a>,
    stall_timeout: Duration,
    /// Samples skipped before the batches of the current step.
    skipped: Vec<SkippedSample>,
}

impl Batches<'_> {
    /// The next batch, for `step`; a stop or a stalled stream ends the wait.
    fn next(&mut self, step: u64) -> Result<EncodedBatch, TrainError> {
        let (cancel, timeout) = (&self.services.cancel, self.stall_timeout);
        match self.pool.next(&self.stage, cancel, timeout) {
            Ok(batch) => {
                let batch = batch.ok_or(TrainError::StreamEnded { step })?;
                self.skipped.extend_from_slice(&batch.skipped);
                Ok(batch)
            }
            Err(EncodeError::Cancelled) => Err(TrainError::Stopped),
            Err(EncodeError::TimedOut(timeout)) => Err(TrainError::Stalled {
                seconds: timeout.as_secs(),
                stage: self.stage.metrics().snapshot().hanging_stage(Stage::Train),
            }),
            Err(error) => Err(error.into()),
        }
    }
}

/// The lanes of a run: as many as before if it resumes and `data.lanes` does not say otherwise, which the stream then refuses.
fn run_lanes(
    options: &RunOptions<'_>,
    shards: usize,
    state: &TrainState,
) -> Result<Lanes, TrainError> {
    let config = options.config;
    let saved = state.cursor.as_ref().map(Cursor::lane_count);
    let count = match (config.data.lanes, saved) {
        (None, Some(saved)) => saved,
        _ => config.lanes(shards),
    };
    let rank = options.job.collective.rank();
    Ok(rank.lanes(count, config.batches_in_turn(count))?)
}

/// Encoders of the pool's threads: those of the run for the first device, others for the rest. Stored latents with stored
/// embeddings need no second thread.
fn pool_encoders(
    options: &RunOptions<'_>,
    encoders: &Arc<Encoders>,
) -> Result<Vec<Arc<Encoders>>, TrainError> {
    let stored = options.config.data.latents() == Some(TextFrom::Embeds);
    let devices = options.encode_devices.iter().skip(1);
    let devices = devices.take(if stored { 0 } else { usize::MAX });
    let mut all = vec![Arc::clone(encoders)];
    for device in devices {
        let encoders = load_encoders(options, device)?.without_decoder();
        all.push(Arc::new(encoders));
    }
    Ok(all)
}

/// The state of the checkpoint to resume from, or the state before the first step. Rank 0, which has the output, chooses the
/// checkpoint; every rank reads it.
fn load_state(
    options: &RunOptions<'_>,
    services: &Services<'_>,
    parts: &RunParts,
    output: Option<(&Saver, &RunDir)>,
    progress: &Progress,
) -> Result<TrainState, TrainError> {
    let config = options.config;
    let mut found = None;
    if let Some((saver, output)) = output {
        saver.checkpoints().clear_unfinished()?;
        let (models, folder) = (&parts.fingerprint, output);
        found = resume_from(options, models, saver, folder, services, progress)?;
    }
    let chosen = found.as_ref().map(|found| found.place.as_str());
    let chosen = same_run(options).text_of_rank_0(chosen.unwrap_or_default())?;
    if found.is_none() && !chosen.is_empty() {
        found = Some(resume_from_place(config, &chosen, services)?);
    }
    let folder = found.as_ref().map(|found| found.folder.as_path());
    let student = load_student(options, &parts.unet, folder)?;
    let numbers = student.params().iter().map(|(_, var)| var.elem_count());
    let millions = numbers.sum::<usize>() as f64 / 1e6;
    progress.say(format!(
        "training {}, {millions:.2} M parameters",
        student.describe()
    ));
    let scaled = config.train.mixed_precision == MixedPrecision::Fp16;
    let rank = options.job.collective.rank();
    let optimizer = AdamW::new(&config.optimizer, student.params(), scaled, rank)?;
    let mut state = TrainState::new(student, optimizer);
    if let Some(found) = found {
        restore_optimizer(&found, &mut state.optimizer, options.device)?;
        (state.step, state.samples) = (found.state.step, found.state.samples);
        state.cursor = Some(found.state.cursor);
    }
    if let Some((saver, _)) = output {
        saver.records().fetch()?;
    }
    Ok(state)
}
