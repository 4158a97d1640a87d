//! The loop: from the stream of batches to a finished student.

mod finish;
mod pictures;
mod prepare;
mod save;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use coffey_pipeline::flow::{FlowSnapshot, Recent, StageHandle};
use coffey_pipeline::order::rng::index_below;
use coffey_pipeline::order::{Cursor, Order};
use coffey_pipeline::stages::Stage;

use super::audit::Auditor;
use super::checkpoint::Saver;
use super::data::Data;
use super::learning_rate::learning_rate;
use super::log::{MetricsLog, StepRecord};
use super::loss_scale::LossScale;
use super::optimizer::{AdamW, Gradients};
use super::output::Output;
use super::progress::Progress;
use super::report::Endpoint;
use super::skipped::SkippedLog;
use super::tracking::Tracker;
use super::validation::Prompts;
use super::watchdog::Watchdog;
use super::{Distillation, StepInputs, Student, TrainError, io};
use crate::config::{self, Config, Validation};
use crate::encode::{EncodePool, EncodedBatch, Encoders, Worker};
use crate::models::UNet;
use crate::models::vae::sample_latents;
use crate::monitor::Monitor;
use crate::ops;
use crate::pretrained::Models;
use crate::random::{generator, normal, uniform};
use crate::stop::Stop;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are made and the finished student is in this folder.
    Done(PathBuf),
    /// A stop was asked for; a checkpoint of the last step is saved.
    Stopped,
}

/// Distils as a configuration says; see the module's documentation for what is left in the output folder.
///
/// `models` are those the configuration names; `devices` are the trainer's and, one a worker, the encoders'.
///
/// # Errors
/// [`TrainError`]; a checkpoint that stands is never harmed.
pub fn run(
    config: &Config,
    paths: config::TrainPaths<'_>,
    models: &Models,
    data: &Data<'_>,
    devices: (&Device, &[Device]),
    stop: &Stop,
) -> Result<Outcome, TrainError> {
    let mut progress = Progress::new(config.train.max_steps);
    let outcome = Run::prepare(
        config,
        (paths.output, models),
        data,
        devices,
        stop,
        &progress,
    )
    .and_then(|run| run.drive(data, devices, stop, &mut progress));
    progress.finish();
    match outcome {
        Err(TrainError::Stopped) => Ok(Outcome::Stopped),
        outcome => outcome,
    }
}

/// Everything the loop needs, loaded and checked.
struct Run<'a> {
    config: &'a Config,
    models: &'a Models,
    distillation: Distillation,
    encoders: Encoders,
    /// Embedding of the empty caption, `[1, T, width]`.
    uncond: Tensor,
    teacher: UNet,
    student: Student,
    optimizer: AdamW,
    saver: Saver,
    configuration: String,
    log: MetricsLog,
    skipped: SkippedLog,
    tracker: Tracker,
    monitor: Monitor,
    /// What limits the run.
    recent: Recent,
    endpoint: Option<Endpoint>,
    validation: Option<(Prompts, &'a Validation)>,
    auditor: Option<Auditor>,
    step: u64,
    samples: u64,
    cursor: Option<Cursor>,
    /// The step of the newest checkpoint.
    saved: Option<u64>,
    /// The last to go: it is this process's until the saver has written its last.
    output: Output,
}

impl Run<'_> {
    fn drive(
        mut self,
        data: &Data<'_>,
        (device, encode_devices): (&Device, &[Device]),
        stop: &Stop,
        progress: &mut Progress,
    ) -> Result<Outcome, TrainError> {
        let Config { train, .. } = self.config;
        if self.step < train.max_steps {
            let stream = (data.open)(Order::Shuffled, train.batch_size, self.cursor.clone())?;
            let Config { data, encode, .. } = self.config;
            let workers = encode_devices
                .iter()
                .map(|device| Worker::load(data, self.models, device, encode.batch_size))
                .collect::<Result<Vec<_>, _>>()?;
            let metrics = self.monitor.flow().clone();
            let mut pool = EncodePool::start(stream, workers, &metrics)?;
            let wake = pool.interrupter();
            stop.on_stop(move || wake.interrupt());
            let wake = pool.interrupter();
            let watchdog = Watchdog::start(Duration::from_secs(train.stall_timeout), move || {
                wake.interrupt()
            })
            .map_err(io(self.output.place()))?;
            progress.start_at(self.step);
            progress.say("waiting for the first batch");
            let stage = metrics.stage(Stage::Train);
            let (begun, first) = (Instant::now(), self.step);
            self.monitor.expect("steps", self.step, train.max_steps);
            self.monitor.beat();
            self.missing_grids(progress, stop)?;
            while self.step < train.max_steps {
                if stop.asked() {
                    self.save_at_the_end(progress)?;
                    self.summarize(progress, first, begun);
                    return Ok(Outcome::Stopped);
                }
                match self.one_step(&mut pool, &watchdog, &stage, device, begun) {
                    Err(TrainError::StreamEnded { .. }) if stop.asked() => continue,
                    Err(TrainError::StreamEnded { .. }) if watchdog.barked() => {
                        return Err(TrainError::Stalled {
                            seconds: train.stall_timeout,
                            stage: metrics.snapshot().hanging_stage(Stage::Train),
                        });
                    }
                    made => {
                        let record = made?;
                        progress.step(&record);
                        self.tracker.step(&record, progress);
                    }
                }
                self.after_step(progress, stop)?;
                self.monitor.beat();
            }
            self.monitor.rest();
            self.summarize(progress, first, begun);
        }
        self.finish(progress, stop)
    }

    /// Makes one step and records it.
    fn one_step(
        &mut self,
        pool: &mut EncodePool,
        watchdog: &Watchdog,
        stage: &StageHandle,
        device: &Device,
        begun: Instant,
    ) -> Result<StepRecord, TrainError> {
        let started = Instant::now();
        let train = &self.config.train;
        let step = self.step + 1;
        let failed = |source| TrainError::Step { step, source };
        let loss_scale = self.optimizer.loss_scale();
        if loss_scale.is_some_and(LossScale::exhausted) {
            return Err(TrainError::NotFinite {
                step,
                what: "a gradient, whatever the loss scale,".to_owned(),
            });
        }
        let factor = loss_scale.map(LossScale::factor);
        let (mut gradients, mut loss, mut count) = (Gradients::new(), 0.0, 0);
        let mut held = None; // the last micro-batch, until the gradient norm is known
        let (mut reached, mut skipped) = (None, Vec::new());
        for micro in 0..train.gradient_accumulation {
            watchdog.watch();
            let next = pool.next(stage);
            watchdog.rest();
            let mut batch = next.ok_or(TrainError::StreamEnded { step })??;
            skipped.append(&mut batch.skipped);
            count += batch.samples.len() as u64;
            let epoch = batch.samples.last().map_or(0, |s| s.epoch);
            reached = Some((batch.cursor.clone(), epoch));
            let (inputs, outputs, value) = stage
                .work(|| {
                    let inputs = self.draw(step, micro, batch, device)?;
                    let outputs = self.distillation.forward(
                        self.student.unet(),
                        self.student.target(),
                        &self.teacher,
                        &inputs,
                    )?;
                    let share = factor.unwrap_or(1.0) / train.gradient_accumulation as f64;
                    let scaled = (&outputs.loss * share)?;
                    self.accumulate(&mut gradients, ops::backward(&scaled)?)?;
                    let value = f64::from(outputs.loss.to_scalar::<f32>()?);
                    Ok((inputs, outputs, value))
                })
                .map_err(failed)?;
            if !value.is_finite() && factor.is_none() {
                return Err(TrainError::NotFinite {
                    step,
                    what: "the loss".to_owned(),
                });
            }
            loss += value / train.gradient_accumulation as f64;
            if let Some(auditor) = self.auditor.as_ref().filter(|a| a.covers(step)) {
                if micro + 1 == train.gradient_accumulation {
                    held = Some((inputs, outputs));
                } else {
                    auditor.record((step, micro), &inputs, &outputs, None)?;
                }
            }
        }
        self.check_gradients(&gradients)?;
        // As accelerate: a step that overflowed does not count for the schedule.
        let made = self.optimizer.steps() + 1;
        let rate = learning_rate(&self.config.optimizer, made, train.max_steps);
        let norm = stage.work(|| self.optimizer.norm(&gradients));
        let norm = match loss.is_finite() {
            true => norm.map_err(failed)?,
            false => f64::NAN,
        };
        if !norm.is_finite() && factor.is_none() {
            return Err(TrainError::NotFinite {
                step,
                what: "the gradient".to_owned(),
            });
        }
        if let (Some(auditor), Some((inputs, outputs))) = (&self.auditor, held) {
            let micro = train.gradient_accumulation - 1;
            auditor.record((step, micro), &inputs, &outputs, Some((norm, rate)))?;
        }
        stage
            .work(|| {
                self.optimizer
                    .step(self.student.variables(), &gradients, norm, rate)?;
                self.student.update_target(self.config.distill.ema_decay)
            })
            .map_err(failed)?;
        if let Some(auditor) = &self.auditor {
            auditor.end_of_step(step, &self.student)?;
        }
        self.step = step;
        self.samples += count;
        stage.add_items(count);
        let epoch = reached.as_ref().map_or(0, |(_, epoch)| *epoch);
        self.cursor = reached.map(|(cursor, _)| cursor);
        let mut record = StepRecord {
            step,
            loss,
            lr: rate,
            grad_norm: norm,
            loss_scale: factor,
            samples: self.samples,
            epoch,
            endpoint_error: None,
            samples_per_second: count as f64 / started.elapsed().as_secs_f64(),
            seconds: begun.elapsed().as_secs_f64(),
            limiting_stage: self
                .recent
                .mark(stage.metrics())
                .and_then(FlowSnapshot::limiting_stage),
        };
        let report = &self.config.report;
        if let Some(endpoint) = &self.endpoint
            && (step.is_multiple_of(report.endpoint_every) || step == train.max_steps)
        {
            let never = Stop::default();
            record.endpoint_error =
                Some(endpoint.of(self.student.target(), &self.distillation, &never)?);
        }
        self.skipped.write(step, pool.stream().shards(), &skipped);
        self.log.write(record.clone());
        self.monitor.step((&record).into());
        Ok(record)
    }

    /// Draws a step's random numbers, all keyed by the step and the micro-batch.
    fn draw(
        &self,
        step: u64,
        micro: usize,
        batch: EncodedBatch,
        device: &Device,
    ) -> candle_core::Result<StepInputs> {
        let distill = &self.config.distill;
        let generator = |purpose| generator(self.config.train.seed, purpose, step, micro as u64);
        let moments = batch.moments.to_device(device)?;
        let (b, c, h, w) = moments.dims4()?;
        let shape = [b, c / 2, h, w];
        let posterior = normal(&mut generator("posterior"), &shape, device)?;
        let factor = self.encoders.vae().config().scaling_factor;
        let mut rng = generator("timestep");
        let index = (0..b)
            .map(|_| index_below(&mut rng, self.distillation.solver.len()))
            .collect();
        let mut rng = generator("guidance");
        let weights = (0..b)
            .map(|_| uniform(&mut rng, distill.w_min, distill.w_max))
            .collect();
        let mut rng = generator("empty prompt");
        let prompt_embeds = batch.prompt_embeds.to_device(device)?;
        let embeds = (0..b)
            .map(
                |i| match uniform(&mut rng, 0.0, 1.0) < distill.proportion_empty_prompts {
                    true => Ok(self.uncond.clone()),
                    false => prompt_embeds.narrow(0, i, 1),
                },
            )
            .collect::<candle_core::Result<Vec<_>>>()?;
        let (_, t, width) = self.uncond.dims3()?;
        Ok(StepInputs {
            latents: sample_latents(&moments, &posterior, factor)?,
            noise: normal(&mut generator("noise"), &shape, device)?,
            index,
            w: weights,
            prompt_embeds: Tensor::cat(&embeds, 0)?,
            uncond_prompt_embeds: self.uncond.broadcast_as((b, t, width))?.contiguous()?,
        })
    }

    /// Adds the gradients of a micro-batch to those of earlier ones.
    fn accumulate(
        &self,
        gradients: &mut Gradients,
        mut found: ops::Gradients,
    ) -> candle_core::Result<()> {
        for (name, var) in self.student.variables() {
            let Some(gradient) = found.remove(var) else {
                continue;
            };
            let sum = match gradients.remove(name) {
                Some(earlier) => earlier.add(&gradient)?,
                None => gradient,
            };
            gradients.insert(name.clone(), sum);
        }
        Ok(())
    }

    /// Every variable must have a gradient: candle drops some without an error.
    fn check_gradients(&self, gradients: &Gradients) -> Result<(), TrainError> {
        let missing = |name: &&String| !gradients.contains_key(*name);
        let names: Vec<&str> = self
            .student
            .variables()
            .keys()
            .filter(missing)
            .map(String::as_str)
            .collect();
        match names.is_empty() {
            true => Ok(()),
            false => Err(TrainError::NoGradient {
                names: names.join(", "),
            }),
        }
    }

    /// Checkpoints, grids and curves that are due.
    fn after_step(&mut self, progress: &Progress, stop: &Stop) -> Result<(), TrainError> {
        self.saves_that_are_over(progress);
        let troubles = [self.log.trouble(), self.skipped.trouble()];
        for error in troubles.into_iter().flatten() {
            progress.say(format!(
                "warning: {error}; the lines are kept and written when that is possible again"
            ));
        }
        // First what can be lost, then what can be drawn again.
        let due = self.step.is_multiple_of(self.config.checkpoint.every);
        if due && self.step < self.config.train.max_steps {
            self.save(progress)?;
        }
        self.grids(progress, stop)
    }
}
