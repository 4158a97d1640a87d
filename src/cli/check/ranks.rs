//! The ranks of a run: what each reads, and how fast they exchange a step's tensors.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use coffey_pipeline::counted;
use serde::Serialize;

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

/// The ranks of a run, as rank 0 sees them. Field names are the keys of `--json`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RanksCheck {
    description: String,
    ranks: usize,
    lanes: usize,
    lanes_of_a_rank: usize,
    shards_of_a_rank: usize,
    trained_parameters: u64,
    /// Bytes of gradients, summed and sent back as weights, a second.
    exchange_bytes_per_second: f64,
    /// Time of the exchange of a step.
    exchange_seconds: f64,
    #[serde(skip)]
    shards: usize,
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
        let parameters = teacher.map_or(0, |teacher| trained_parameters(config, teacher));
        let speed = exchange_speed(collective, job.limit)?;
        let ranks = collective.rank().world;
        Ok(Self {
            description: job.description.clone(),
            ranks,
            lanes,
            lanes_of_a_rank: own.hosted.len(),
            shards_of_a_rank: shards.div_ceil(ranks),
            trained_parameters: parameters,
            exchange_bytes_per_second: speed,
            exchange_seconds: (parameters * size_of::<f32>() as u64) as f64 / speed,
            shards,
        })
    }

    pub(super) fn message(&self) -> String {
        format!(
            "{}; each reads {} of {} and about {} of {}; gradients and weights of {:.1} M parameters take {:.2} s a step at {:.2} GB/s",
            self.description,
            self.lanes_of_a_rank,
            counted(self.lanes, "lane"),
            self.shards_of_a_rank,
            counted(self.shards, "shard"),
            self.trained_parameters as f64 / 1e6,
            self.exchange_seconds,
            self.exchange_bytes_per_second / 1e9,
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
