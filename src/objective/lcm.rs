//! Latent consistency distillation: section 20.4 of diffusers' `train_lcm_distill_sd_wds.py`; Luo et al., *Latent Consistency
//! Models*, 2023.

use candle_core::Result;
use serde_json::{Map, Value, json};

use super::{
    Distillation, Estimate, Networks, Objective, StepInputs, StepKey, StepOutput, StepResults,
};
use crate::diffusion::{BoundaryScaling, LcmSampler, Sampler, mix};
use crate::encode::EncodedBatch;

/// Consistency at the trajectory's end: every point predicts the clean latent, `f(x, t) = c_skip·x + c_out·x̂₀`.
#[derive(Clone, Debug)]
pub struct Lcm {
    /// Teacher's process, distance and draws.
    pub distillation: Distillation,
    /// The consistency model's boundary condition.
    pub boundary: BoundaryScaling,
}

impl Lcm {
    /// Forward passes over drawn inputs.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn forward(&self, networks: &Networks<'_>, inputs: &StepInputs) -> Result<StepResults> {
        let schedule = &self.distillation.schedule;
        self.distillation.forward(networks, inputs, |estimate| {
            let Estimate {
                x,
                timesteps,
                output,
            } = estimate;
            let original = schedule.predicted_original(output, x, timesteps)?;
            let (skip, out) = self.boundary.each(timesteps);
            mix(&skip, x, &out, &original)
        })
    }
}

impl Objective for Lcm {
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput> {
        let inputs = self.distillation.draw(batch, key)?;
        let results = self.forward(networks, &inputs)?;
        Distillation::output(&inputs, results)
    }

    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_> {
        Box::new(LcmSampler::new(
            &self.distillation.schedule,
            self.boundary,
            steps,
        ))
    }

    fn describe(&self) -> Map<String, Value> {
        self.distillation.describe(json!({
            "objective": "lcm",
            "timestep_scaling": self.boundary.timestep_scaling,
            "sigma_data": self.boundary.sigma_data,
        }))
    }
}
