//! `[train]`: the output, length, batch, precision and seed of a run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, MAX_STEPS, integer};
use super::limits::Limits;
use super::values::{DeviceSpec, FloatType};
use crate::ops::Attention;

/// Bounds of the numbers in `[train]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("train.max_steps", 1, MAX_STEPS),
    integer("train.batch_size", 1, 65_536),
    integer("train.gradient_accumulation", 1, 65_536),
    integer("train.seed", 0, i64::MAX),
    integer("train.stall_timeout", 1, 31_536_000),
];

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// Folder of the run, or an `s3://` prefix; `train` needs it. `--output_dir`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,
    /// Local folder for the records of a run whose output is in S3, until they are uploaded; the system's folder for
    /// temporary files when unset. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// Device of teacher, student and target. `accelerate` decides in the reference.
    pub device: DeviceSpec,
    /// Optimiser steps of the whole run, including the steps before a resume. `--max_train_steps`
    pub max_steps: u64,
    /// Samples of one forward and backward pass. `--train_batch_size`
    pub batch_size: usize,
    /// Passes summed up in one optimiser step. `--gradient_accumulation_steps`
    pub gradient_accumulation: usize,
    /// Recompute the activations inside blocks in the backward pass: less memory, the same numbers. `--gradient_checkpointing`
    pub gradient_checkpointing: bool,
    /// How attention is computed. `--enable_xformers_memory_efficient_attention`
    pub attention: Attention,
    /// Type of the student's passes. `--mixed_precision`
    pub mixed_precision: MixedPrecision,
    /// Type the teacher's weights are held in; the CPU computes in f32. `--cast_teacher_unet`
    pub teacher_dtype: FloatType,
    /// Let CUDA devices round the operands of f32 products and convolutions to TF32. `--allow_tf32`
    pub tf32: bool,
    /// Seed of all random draws. `--seed`
    pub seed: u64,
    /// Seconds of waiting for a batch before the run ends, naming the stage that hangs. No flag.
    pub stall_timeout: u64,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            output: None,
            scratch: None,
            device: DeviceSpec::Cpu,
            max_steps: 1000,
            batch_size: 12,
            gradient_accumulation: 1,
            gradient_checkpointing: true,
            attention: Attention::MemoryEfficient,
            mixed_precision: MixedPrecision::No,
            teacher_dtype: FloatType::F32,
            tf32: false,
            seed: 453_645_634,
            stall_timeout: 1800,
        }
    }
}

impl Train {
    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        limits.folder_or_prefix("train.output", self.output.as_deref())?;
        limits.path("train.scratch", self.scratch.as_deref())?;
        limits.device("train.device", self.device)
    }
}

/// Type the student's forward and backward passes run in; the master weights are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MixedPrecision {
    /// f32 throughout.
    No,
    /// Half precision, with a loss scale that keeps small gradients from vanishing.
    Fp16,
    /// bfloat16, which has the range of f32.
    Bf16,
}
