//! The training step: from batches to updated variables.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use candle_core::{Result, Tensor};
use coffey_pipeline::SkippedSample;
use coffey_pipeline::flow::StageHandle;
use coffey_pipeline::order::{Cursor, Lanes};
use tokio_util::sync::CancellationToken;

use super::agreement::{StepPart, agree};
use super::learning_rate::learning_rate;
use super::{LossScale, StepRecord, StepReport, TrainError, TrainState};
use crate::config;
use crate::encode::EncodedBatch;
use crate::models::Denoiser;
use crate::monitor::RankFigures;
use crate::objective::{Networks, Objective, StepKey, Trace};
use crate::ops;
use crate::params::Grads;
use crate::ranks::{
    Collective, ExchangeError, Patience, TreeSum, send_own, sum_of_all, sum_of_own,
};

/// Settings of the step.
#[derive(Clone, Debug)]
pub struct TrainerOptions {
    /// Seed of all random numbers.
    pub seed: u64,
    /// Steps of the whole run, over which the learning-rate schedule extends.
    pub max_steps: u64,
    /// The lanes whose batches are the micro-batches of a step, and those of this process.
    pub lanes: Lanes,
    /// Time without an answer of another rank after which the run fails.
    pub rank_timeout: Duration,
    /// Decay of the student's moving average, if it has one.
    pub ema_decay: f64,
    /// Learning rate, its schedule, and the norm that gradients are clipped to.
    pub optimizer: config::Optimizer,
}

/// How one step is made.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions<'a> {
    /// Cancelled when the run is to stop.
    pub cancel: &'a CancellationToken,
    /// Keep the traces of the micro-batches.
    pub keep_traces: bool,
}

/// Makes the steps of a run.
#[derive(Debug)]
pub struct Trainer {
    objective: Box<dyn Objective>,
    teacher: Rc<dyn Denoiser>,
    state: TrainState,
    collective: Rc<dyn Collective>,
    options: TrainerOptions,
    stage: StageHandle,
    begun: Instant,
    /// Of a step whose loss is not finite, the first tensor of the trace that is not; the outer `None` after another step.
    bad_loss: Option<Option<&'static str>>,
}

/// Sums over micro-batches.
#[derive(Default)]
struct LaneSums {
    gradients: Grads,
    /// Part of the step's mean loss.
    loss: f64,
}

/// What the micro-batches of a step leave beside their sums.
#[derive(Default)]
struct StepFacts {
    samples: u64,
    /// Epoch of the last sample.
    epoch: u64,
    /// Position in the stream after the last batch.
    cursor: Option<Cursor>,
    traces: Vec<Trace>,
    skipped: Vec<SkippedSample>,
}

impl StepFacts {
    /// Counts the samples of a micro-batch, and keeps its trace if there is one.
    fn add(&mut self, batch: EncodedBatch, trace: Option<Trace>) {
        self.samples += batch.samples.len() as u64;
        self.epoch = batch.samples.last().map_or(0, |sample| sample.epoch);
        self.cursor = Some(batch.cursor);
        self.traces.extend(trace);
        self.skipped.extend(batch.skipped);
    }
}

impl Trainer {
    /// A trainer that continues from `state`. `stage` accounts the time it works.
    pub fn new(
        objective: Box<dyn Objective>,
        teacher: Rc<dyn Denoiser>,
        state: TrainState,
        collective: Rc<dyn Collective>,
        options: TrainerOptions,
        stage: StageHandle,
    ) -> Self {
        Self {
            objective,
            teacher,
            state,
            collective,
            options,
            stage,
            begun: Instant::now(),
            bad_loss: None,
        }
    }

    /// The state after the last step.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// The objective.
    pub fn objective(&self) -> &dyn Objective {
        &*self.objective
    }

    /// Makes one step over the micro-batches that `next_batch` gives, together with the other ranks.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] if a rank was asked to stop before it had its micro-batches; an error of `next_batch`,
    /// [`TrainError::NotFinite`], or a failed tensor operation: the state then stays as it was. A rank that does not answer:
    /// the state may then be that of no step, and the run can only end.
    pub fn step(
        &mut self,
        next_batch: &mut dyn FnMut() -> std::result::Result<EncodedBatch, TrainError>,
        options: StepOptions<'_>,
    ) -> std::result::Result<StepReport, TrainError> {
        let started = Instant::now();
        let (step, stage) = (self.state.step + 1, self.stage.clone());
        let failed = |source| TrainError::Step { step, source };
        let loss_scale = self.loss_scale(step)?;
        let made = match options.cancel.is_cancelled() {
            true => Err(TrainError::Stopped),
            false => self.micro_batches(step, next_batch, loss_scale, options.keep_traces),
        };
        let (sums, facts) = match made {
            Ok(made) => made,
            Err(TrainError::Stopped) => (LaneSums::default(), StepFacts::default()),
            Err(error) => return Err(error),
        };
        let part = match facts.cursor {
            None => StepPart::interrupted(),
            Some(cursor) => StepPart {
                stop: options.cancel.is_cancelled(),
                samples: facts.samples,
                seconds: started.elapsed().as_secs_f64(),
                epoch: facts.epoch,
                cursor: Some(cursor),
                ..StepPart::new(sums.loss, &facts.skipped)
            },
        };
        let (collective, waiting) = (Rc::clone(&self.collective), Instant::now());
        let agreed = agree(&*collective, part, self.options.rank_timeout)?;
        if !agreed.made {
            return Err(TrainError::Stopped);
        }
        self.check_gradients(&sums.gradients)?;
        let patience = Patience::ForData(self.options.rank_timeout);
        let not_exchanged = |error| match error {
            ExchangeError::Ranks(error) => error.into(),
            ExchangeError::Tensor(source) => failed(source),
        };
        let shares = self.state.optimizer.shares();
        let exchanging = Instant::now();
        let own = sum_of_own(&*collective, shares, sums.gradients, patience);
        let own = own.map_err(not_exchanged)?;
        let mut exchange = exchanging.elapsed();
        stage.add_starved(waiting.elapsed());
        let squares = stage.work(|| squared_norms(&own)).map_err(failed)?;
        let squares = sum_of_all(&*collective, shares, &squares, patience)?;
        let loss = agreed.loss;
        let norm = match loss.is_finite() {
            true => self.state.optimizer.norm(squares),
            false => f64::NAN,
        };
        self.check_finite(step, "the gradient", norm)?;
        let rate = self.learning_rate();
        stage
            .work(|| self.update_own(&own, norm, rate))
            .map_err(failed)?;
        let waiting = Instant::now();
        self.update_others(patience).map_err(not_exchanged)?;
        stage.add_starved(waiting.elapsed());
        exchange += waiting.elapsed();
        stage.work(|| self.follow()).map_err(failed)?;
        self.state.step = step;
        self.state.samples += agreed.samples;
        self.state.cursor = agreed.cursor;
        stage.add_items(facts.samples);
        Ok(StepReport {
            record: StepRecord {
                step,
                loss,
                lr: rate,
                grad_norm: norm,
                loss_scale,
                samples: self.state.samples,
                epoch: agreed.epoch,
                endpoint_error: None,
                samples_per_second: agreed.samples as f64 / started.elapsed().as_secs_f64(),
                seconds: self.begun.elapsed().as_secs_f64(),
                limiting_stage: None,
            },
            traces: facts.traces,
            skipped: agreed.skipped,
            ranks: rank_figures(&agreed.seconds, exchange),
            stop: agreed.stop,
        })
    }

    /// Forward and backward passes over the micro-batches of this process's lanes.
    fn micro_batches(
        &mut self,
        step: u64,
        next_batch: &mut dyn FnMut() -> std::result::Result<EncodedBatch, TrainError>,
        loss_scale: Option<f64>,
        keep_traces: bool,
    ) -> std::result::Result<(LaneSums, StepFacts), TrainError> {
        let stage = self.stage.clone();
        let failed = |source| TrainError::Step { step, source };
        let Lanes {
            hosted,
            batches_in_turn,
            ..
        } = self.options.lanes.clone();
        let (mut facts, mut sum) = (StepFacts::default(), TreeSum::default());
        self.bad_loss = None;
        for lane in hosted {
            let mut sums = LaneSums::default();
            for in_turn in 0..batches_in_turn {
                let batch = next_batch()?;
                let key = self.key(step, lane * batches_in_turn + in_turn);
                let work = || self.micro_batch(&batch, &key, loss_scale.unwrap_or(1.0), &mut sums);
                let (loss, trace) = stage.work(work).map_err(failed)?;
                if !loss.is_finite() {
                    self.bad_loss = Some(trace.first_not_finite().map_err(failed)?);
                }
                self.check_finite(step, "the loss", loss)?;
                facts.add(batch, keep_traces.then_some(trace));
            }
            let params = self.state.student.params();
            let add = |earlier: LaneSums, later: LaneSums| {
                Ok(LaneSums {
                    gradients: params.add(earlier.gradients, later.gradients)?,
                    loss: earlier.loss + later.loss,
                })
            };
            stage.work(|| sum.push(sums, add)).map_err(failed)?;
        }
        Ok((sum.finish().unwrap_or_default(), facts))
    }

    /// Learning rate of the next step. As accelerate: a step that overflowed does not advance the schedule.
    fn learning_rate(&self) -> f64 {
        let step = self.state.optimizer.steps() + 1;
        learning_rate(&self.options.optimizer, step, self.options.max_steps)
    }

    fn key(&self, step: u64, micro_batch: usize) -> StepKey {
        StepKey {
            seed: self.options.seed,
            step,
            micro_batch: micro_batch as u64,
        }
    }

    /// Forward and backward pass of one micro-batch: adds its gradients and its loss to the sums. Returns its loss and trace.
    fn micro_batch(
        &self,
        batch: &EncodedBatch,
        key: &StepKey,
        loss_scale: f64,
        sums: &mut LaneSums,
    ) -> Result<(f64, Trace)> {
        let student = &self.state.student;
        student.begin(key.step, key.micro_batch);
        let networks = Networks {
            student: student.student(),
            target: student.target(),
            teacher: &*self.teacher,
        };
        let lanes = &self.options.lanes;
        let micro_batches = (lanes.count * lanes.batches_in_turn) as f64;
        let (gradients, output) = ops::gradients(|| {
            let output = self.objective.step(&networks, batch, key)?;
            Ok(((&output.loss * (loss_scale / micro_batches))?, output))
        })?;
        student
            .params()
            .accumulate(&mut sums.gradients, gradients)?;
        let loss = f64::from(output.loss.to_scalar::<f32>()?);
        sums.loss += loss / micro_batches;
        Ok((loss, output.trace))
    }

    /// Updates the variables of this rank.
    fn update_own(&mut self, gradients: &Grads, norm: f64, rate: f64) -> Result<()> {
        let TrainState {
            student, optimizer, ..
        } = &mut self.state;
        optimizer.step(student.params(), gradients, norm, rate)
    }

    /// Sends the variables of this rank to the others and takes over theirs.
    fn update_others(&self, patience: Patience) -> std::result::Result<(), ExchangeError> {
        let TrainState {
            student, optimizer, ..
        } = &self.state;
        let params = student.params();
        let set = |name: &str, value: &Tensor| params.set(name, value);
        let shares = optimizer.shares();
        send_own(&*self.collective, shares, &params.values(), patience, set)
    }

    /// Moves the moving average towards the variables.
    fn follow(&self) -> Result<()> {
        let student = &self.state.student;
        match student.target_params() {
            Some(target) => target.follow(student.params(), self.options.ema_decay),
            None => Ok(()),
        }
    }

    /// Gathers the moments of all ranks on rank 0, where a checkpoint holds them. Every rank calls it.
    ///
    /// # Errors
    /// When a rank does not answer, or a tensor operation fails.
    pub fn gather_moments(&mut self) -> std::result::Result<(), TrainError> {
        let patience = Patience::ForData(self.options.rank_timeout);
        let TrainState {
            student, optimizer, ..
        } = &mut self.state;
        Ok(optimizer.gather_moments(&*self.collective, student.params(), patience)?)
    }

    /// Drops what [`Self::gather_moments`] gathered.
    pub fn release_moments(&mut self) {
        self.state.optimizer.release_moments();
    }

    /// Factor of the loss, if it is scaled.
    fn loss_scale(&self, step: u64) -> std::result::Result<Option<f64>, TrainError> {
        let scale = self.state.optimizer.loss_scale();
        if scale.is_some_and(LossScale::exhausted) {
            let number = self.bad_loss.map_or("a gradient", |_| "the loss");
            return Err(self.not_finite(step, format!("{number}, whatever the loss scale,")));
        }
        Ok(scale.map(LossScale::factor))
    }

    /// Refuses a number that is not finite, unless the loss is scaled: the loss scale is lowered then.
    fn check_finite(
        &self,
        step: u64,
        what: &str,
        number: f64,
    ) -> std::result::Result<(), TrainError> {
        if number.is_finite() || self.state.optimizer.loss_scale().is_some() {
            return Ok(());
        }
        Err(self.not_finite(step, what.to_owned()))
    }

    fn not_finite(&self, step: u64, what: String) -> TrainError {
        TrainError::NotFinite {
            step,
            what,
            origin: self.bad_loss.flatten(),
            advice: String::new(),
        }
    }

    /// Refuses variables without a gradient: candle drops some gradients without an error.
    fn check_gradients(&self, gradients: &Grads) -> std::result::Result<(), TrainError> {
        let names = self.state.student.params().without_gradient(gradients);
        if names.is_empty() {
            return Ok(());
        }
        Err(TrainError::NoGradient {
            names: names.join(", "),
        })
    }
}

/// The sum of the squares of each gradient.
fn squared_norms(gradients: &Grads) -> Result<BTreeMap<&str, f64>> {
    let tensors: Vec<&Tensor> = gradients.values().collect();
    let norms = ops::squared_norms(&tensors)?;
    Ok(gradients.keys().map(String::as_str).zip(norms).collect())
}

/// Figures of the ranks, whose times for their micro-batches are `seconds`; `None` for one rank.
fn rank_figures(seconds: &[f64], exchange: Duration) -> Option<RankFigures> {
    let by_time = |a: &(usize, &f64), b: &(usize, &f64)| a.1.total_cmp(b.1);
    let (slowest, slowest_seconds) = seconds.iter().enumerate().max_by(by_time)?;
    let (_, fastest_seconds) = seconds.iter().enumerate().min_by(by_time)?;
    (seconds.len() > 1).then_some(RankFigures {
        ranks: seconds.len(),
        slowest,
        slowest_seconds: *slowest_seconds,
        fastest_seconds: *fastest_seconds,
        exchange_seconds: exchange.as_secs_f64(),
    })
}
