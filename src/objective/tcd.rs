//! Trajectory consistency distillation: Zheng et al., *Trajectory Consistency Distillation*, 2024 (arXiv 2402.19159).

use candle_core::Result;
use coffey_pipeline::order::rng::index_below;
use serde_json::{Map, Value, json};

use super::{Distillation, Networks, Objective, StepKey, StepOutput};
use crate::diffusion::{Sampler, TcdSampler};
use crate::encode::EncodedBatch;

/// Consistency at a random point: every point predicts the trajectory at a timestep `s` that is drawn between 0 and the end of the
/// teacher's step.
#[derive(Clone, Debug)]
pub struct Tcd {
    /// Teacher's process, distance and draws.
    pub distillation: Distillation,
    /// Stochasticity γ of the student's sampler, 0 (deterministic) to 1.
    pub gamma: f64,
}

impl Objective for Tcd {
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput> {
        let distillation = &self.distillation;
        distillation.step_towards(networks, batch, key, "tcd_s", |inputs| {
            let (_, end) = distillation.intervals(&inputs.index);
            let mut rng = key.rng("destination");
            let below = |end: i64| index_below(&mut rng, end as usize + 1) as i64;
            end.into_iter().map(below).collect()
        })
    }

    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_> {
        Box::new(TcdSampler::new(
            &self.distillation.schedule,
            self.gamma,
            steps,
        ))
    }

    fn describe(&self) -> Map<String, Value> {
        self.distillation.describe(json!({ "objective": "tcd" }))
    }
}
