//! The ranks of a run: what each reads, and how fast they exchange a step's tensors.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::counted;

use crate::cli::Failure;
use crate::config::Config;
use crate::memory::{Sizes, trained_parameters};
use crate::params::Tensors;
use crate::ranks::{Collective, ExchangeError, Job, Patience, Shares, send_own, sum_of_own};

/// Tensors of the measurement, of [`NUMBERS`] each.
const TENSORS: usize = 16;
const NUMBERS: usize = 1 << 20;
/// Times that they are exchanged; the fastest counts.
const ROUNDS: usize = 4;

/// The ranks of a run, as rank 0 sees them.
pub(super) struct RanksCheck {
    description: String,
    lanes: usize,
    lanes_each: usize,
    shards: usize,
    world: usize,
    /// Bytes of gradients, summed and sent back as weights, a second.
    speed: f64,
    parameters: u64,
}

impl RanksCheck {
    /// Checks that the ranks can share the run's lanes, and measures their exchange. The other ranks call [`exchange_speed`].
    pub(super) fn new(
        config: &Config,
        job: &Job,
        shards: usize,
        sizes: &Sizes,
    ) -> Result<Self, Failure> {
        let collective = &*job.collective;
        let lanes = config.lanes(shards);
        let own = collective
            .rank()
            .lanes(lanes, config.batches_in_turn(lanes))?;
        let teacher = sizes.teacher.as_ref();
        Ok(Self {
            description: job.description.clone(),
            lanes,
            lanes_each: own.hosted.len(),
            shards,
            world: collective.rank().world,
            speed: exchange_speed(collective, job.limit)?,
            parameters: teacher.map_or(0, |teacher| trained_parameters(config, teacher)),
        })
    }

    pub(super) fn message(&self) -> String {
        let each = self.shards.div_ceil(self.world);
        let bytes = self.parameters as f64 * 4.0;
        format!(
            "{}; each reads {} of {} and about {} of {}; gradients and weights of {:.1} M parameters take {:.2} s a step at {:.2} GB/s",
            self.description,
            self.lanes_each,
            counted(self.lanes, "lane"),
            each,
            counted(self.shards, "shard"),
            self.parameters as f64 / 1e6,
            bytes / self.speed,
            self.speed / 1e9,
        )
    }
}

/// Sums gradients over the ranks and sends weights back, as a step does. Every rank calls it. Returns the bytes of gradients a second.
pub(super) fn exchange_speed(collective: &dyn Collective, limit: Duration) -> Result<f64, Failure> {
    let failed = |error: ExchangeError| match error {
        ExchangeError::Ranks(error) => error.into(),
        ExchangeError::Tensor(error) => Failure::Failed(error.into()),
    };
    let measure = || -> Result<f64, ExchangeError> {
        let tensor = Tensor::ones(NUMBERS, DType::F32, &Device::Cpu)?;
        let tensors = (0..TENSORS).map(|index| (format!("{index:02}"), tensor.clone()));
        let tensors: Tensors = tensors.collect();
        let names = tensors.keys().map(|name| (name.as_str(), NUMBERS));
        let shares = Shares::new(collective.rank(), names);
        let patience = Patience::ForData(limit);
        // The other ranks wait here while rank 0 checks the rest.
        collective.broadcast(Vec::new(), Patience::ForLife(limit))?;
        let mut fastest = f64::INFINITY;
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            sum_of_own(collective, &shares, tensors.clone(), patience)?;
            send_own(collective, &shares, &tensors, patience, |_, _| Ok(()))?;
            fastest = fastest.min(begun.elapsed().as_secs_f64());
        }
        Ok((TENSORS * NUMBERS * size_of::<f32>()) as f64 / fastest)
    };
    measure().map_err(failed)
}
