//! Objectives: the loss that a step minimises, one file an objective.
//!
//! An objective draws its random numbers from a [`StepKey`], runs the networks, and returns a loss. It knows nothing of the loop,
//! the optimiser or the data's origin.

mod distillation;
mod lcm;
mod loss;
mod pcm;
mod tcd;

use std::fmt;

use candle_core::{DType, Device, Result, Tensor};
use coffey_pipeline::order::rng::Rng;
use serde_json::{Map, Value};

pub use distillation::{Distillation, Estimate, StepInputs, StepResults};
pub use lcm::Lcm;
pub use loss::Loss;
pub use pcm::Pcm;
pub use tcd::Tcd;

use crate::diffusion::Sampler;
use crate::encode::EncodedBatch;
use crate::models::Denoiser;
use crate::ops::all_finite;
use crate::random::generator;

/// The networks of a distillation.
#[derive(Clone, Copy, Debug)]
pub struct Networks<'a> {
    /// The student; its forward pass records a graph.
    pub student: &'a dyn Denoiser,
    /// The student's moving average, without a graph.
    pub target: &'a dyn Denoiser,
    /// The teacher, without a graph.
    pub teacher: &'a dyn Denoiser,
}

/// Names the random numbers of one micro-batch: the only source of randomness of an objective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step, from 1.
    pub step: u64,
    /// Micro-batch of the step, from 0.
    pub micro_batch: u64,
}

impl StepKey {
    /// The generator for one purpose, e.g. `"noise"`. Equal keys and purposes give equal numbers.
    pub fn rng(&self, purpose: &str) -> Rng {
        generator(self.seed, purpose, self.step, self.micro_batch)
    }
}

/// The result of an objective for a micro-batch.
#[derive(Clone, Debug)]
pub struct StepOutput {
    /// The loss, an f32 scalar with the student's graph.
    pub loss: Tensor,
    /// Inputs and results by name, detached, for whoever replays the step: see the audit folder in `docs/formats.md`.
    pub trace: Trace,
}

/// Named tensors of one micro-batch, without a graph.
#[derive(Clone, Debug, Default)]
pub struct Trace(Vec<(&'static str, Tensor)>);

impl Trace {
    /// Adds a tensor, without its graph.
    #[must_use]
    pub fn with(mut self, name: &'static str, tensor: &Tensor) -> Self {
        self.0.push((name, tensor.detach()));
        self
    }

    /// Adds a tensor that only some models have, without its graph.
    #[must_use]
    pub fn with_optional(self, name: &'static str, tensor: &Option<Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.with(name, tensor),
            None => self,
        }
    }

    /// Adds one number a sample, as f32 `[B]`.
    ///
    /// # Errors
    /// When the tensor can't be made.
    pub fn with_numbers(self, name: &'static str, numbers: &[f64]) -> Result<Self> {
        let numbers: Vec<f32> = numbers.iter().map(|&number| number as f32).collect();
        Ok(self.with(name, &Tensor::new(numbers, &Device::Cpu)?))
    }

    /// Adds one index a sample, as i64 `[B]`.
    ///
    /// # Errors
    /// When the tensor can't be made.
    pub fn with_indices(self, name: &'static str, indices: &[usize]) -> Result<Self> {
        let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
        self.with_timesteps(name, &indices)
    }

    /// Adds one timestep a sample, as i64 `[B]`.
    ///
    /// # Errors
    /// When the tensor can't be made.
    pub fn with_timesteps(self, name: &'static str, timesteps: &[i64]) -> Result<Self> {
        Ok(self.with(name, &Tensor::new(timesteps, &Device::Cpu)?))
    }

    /// Name of the first tensor with a number that is not finite.
    ///
    /// # Errors
    /// When a tensor can't be read.
    pub fn first_not_finite(&self) -> Result<Option<&'static str>> {
        for (name, tensor) in self
            .0
            .iter()
            .filter(|(_, tensor)| tensor.dtype().is_float())
        {
            if !all_finite(tensor)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The tensors on the CPU, floating-point ones as f32.
    ///
    /// # Errors
    /// When a tensor can't be copied.
    pub fn to_cpu(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let copy = |tensor: &Tensor| {
            let tensor = if tensor.dtype().is_float() {
                tensor.to_dtype(DType::F32)?
            } else {
                tensor.clone()
            };
            tensor.to_device(&Device::Cpu)?.contiguous()
        };
        let tensors = self.0.iter();
        tensors
            .map(|(name, tensor)| Ok((*name, copy(tensor)?)))
            .collect()
    }
}

/// A loss, the random numbers it draws, and the sampler of its student.
pub trait Objective: fmt::Debug {
    /// Forward passes of one micro-batch. Only the student leaves a graph behind.
    ///
    /// # Errors
    /// When a tensor operation fails.
    fn step(
        &self,
        networks: &Networks<'_>,
        batch: &EncodedBatch,
        key: &StepKey,
    ) -> Result<StepOutput>;

    /// The sampler that draws with this objective's student in `steps` steps.
    fn sampler(&self, steps: usize) -> Box<dyn Sampler + '_>;

    /// Settings that a replay of the step needs, for the audit's `meta.json`.
    fn describe(&self) -> Map<String, Value>;
}
