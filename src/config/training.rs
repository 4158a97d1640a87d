//! `[optimizer]`, `[train]` and `[checkpoint]`: how the student is trained, and how it is kept.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::values::{
    Attention, DeviceSpec, FloatType, MixedPrecision, OptimizerKind, Resume, Schedule,
};

/// `[optimizer]`: from gradients to steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Optimizer {
    /// The optimiser. `--use_8bit_adam`
    pub kind: OptimizerKind,
    /// Learning rate after any warmup. `--learning_rate`
    pub learning_rate: f64,
    /// Decay of the first moment. `--adam_beta1`
    pub beta1: f64,
    /// Decay of the second moment. `--adam_beta2`
    pub beta2: f64,
    /// Decoupled weight decay. `--adam_weight_decay`
    pub weight_decay: f64,
    /// Term that keeps the division finite. `--adam_epsilon`
    pub epsilon: f64,
    /// Norm gradients are clipped to, over all variables together. `--max_grad_norm`
    pub max_grad_norm: f64,
    /// How the learning rate changes. `--lr_scheduler`
    pub schedule: Schedule,
    /// Steps of the warmup, for schedules that have one. `--lr_warmup_steps`
    pub warmup_steps: u64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            weight_decay: 0.0,
            epsilon: 1e-8,
            max_grad_norm: 1.0,
            schedule: Schedule::Constant,
            warmup_steps: 0,
        }
    }
}

/// `[train]`: the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Train {
    /// Folder of the run, or an `s3://` prefix; `train` needs it. `--output_dir`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<PathBuf>,
    /// Where a run whose output is in S3 keeps its records until they are uploaded; the system's folder for temporary
    /// files when unset. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PathBuf>,
    /// Where teacher, student and target live. `accelerate` decides in the reference.
    pub device: DeviceSpec,
    /// Optimiser steps of the whole run, those before a resume included. `--max_train_steps`
    pub max_steps: u64,
    /// Samples of one forward and backward pass. `--train_batch_size`
    pub batch_size: usize,
    /// Passes summed up in one optimiser step. `--gradient_accumulation_steps`
    pub gradient_accumulation: usize,
    /// Make the activations inside blocks anew in the backward pass: less memory, the same numbers. `--gradient_checkpointing`
    pub gradient_checkpointing: bool,
    /// How attention is computed. `--enable_xformers_memory_efficient_attention`
    pub attention: Attention,
    /// Type of the student's passes. `--mixed_precision`
    pub mixed_precision: MixedPrecision,
    /// Type the teacher's weights are held in; the CPU computes in f32. `--cast_teacher_unet`
    pub teacher_dtype: FloatType,
    /// Seed of everything drawn at random. `--seed`
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
            seed: 453_645_634,
            stall_timeout: 1800,
        }
    }
}

/// `[checkpoint]`: when state is saved, and what a run starts from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Steps between checkpoints. `--checkpointing_steps`
    pub every: u64,
    /// Newest checkpoints kept. `--checkpoints_total_limit`
    pub keep: usize,
    /// Where to go on from. `--resume_from_checkpoint`
    pub resume: Resume,
    /// Write checkpoints from a copy while training goes on. No flag.
    pub background: bool,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            every: 200,
            keep: 10,
            resume: Resume::Latest,
            background: true,
        }
    }
}
