//! Phased consistency distillation, without its discriminator: Wang et al., *Phased Consistency Models*, 2024 (arXiv 2405.18407).

use candle_core::Result;
use serde_json::{Map, Value, json};

use super::{Distillation, Networks, Objective, StepKey, StepOutput};
use crate::diffusion::{DdimSampler, Sampler};
use crate::encode::EncodedBatch;

/// Consistency within phases: the trajectory is divided into phases, and every point predicts the end of its own.
#[derive(Clone, Debug)]
pub struct Pcm {
    /// Teacher's process, distance and draws.
    pub distillation: Distillation,
    /// Number of phases, at least one and at most the solver's timesteps.
    pub phases: usize,
}

impl Pcm {
    /// Timestep at which the phase of each index ends: that before the phase's first index.
    fn edges(&self, index: &[usize]) -> Vec<i64> {
        let solver = &self.distillation.solver;
        let edge = |index: usize| {
            let edges = (0..self.phases).map(|phase| phase * solver.len() / self.phases);
            edges.take_while(|edge| *edge <= index).last().unwrap_or(0)
        };
        index.iter().map(|&i| solver.interval(edge(i)).1).collect()
    }
}

impl Objective for Pcm {
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput> {
        // At the end of a phase the prediction is the point itself: a DDIM step to its own timestep.
        self.distillation
            .step_towards(networks, batch, key, "pcm_edge", |inputs| {
                self.edges(&inputs.index)
            })
    }

    /// One step for each phase gives the student's trajectory; `steps` steps, as DDIM with trailing timesteps.
    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_> {
        Box::new(DdimSampler::new(&self.distillation.schedule, steps))
    }

    fn describe(&self) -> Map<String, Value> {
        self.distillation
            .describe(json!({ "objective": "pcm", "phases": self.phases }))
    }
}
