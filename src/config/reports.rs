//! `[validation]`, `[report]`, `[track]`, `[metrics]`, `[hub]`, `[latents]` and `[audit]`: what a run leaves behind besides the
//! student, and who can look on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::values::{Listen, TextKind};

/// `[validation]`: grids drawn while training. Without the table none are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Steps between grids. `--validation_steps`
    #[serde(default = "validation_every")]
    pub every: u64,
    /// A row for each. Fixed in the reference.
    pub prompts: Vec<String>,
    /// Sampling steps. Fixed at 4 in the reference.
    #[serde(default = "validation_steps")]
    pub steps: usize,
    /// Guidance the student is told. Fixed at the pipeline's default, 7.5, in the reference.
    #[serde(default = "validation_guidance")]
    pub guidance: f64,
    /// Images of a row. Fixed at 4 in the reference.
    #[serde(default = "images_per_prompt")]
    pub images_per_prompt: usize,
}

fn validation_every() -> u64 {
    200
}

fn validation_steps() -> usize {
    4
}

fn validation_guidance() -> f64 {
    8.0
}

fn images_per_prompt() -> usize {
    4
}

/// `[report]`: how near the student has come to its teacher. Off unless asked for: it samples the teacher at
/// length, which a full-size run should not pay for unasked. No flags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Fixed captions the endpoint error is measured over; 0: it is not measured.
    pub endpoint_captions: usize,
    /// Steps between two measurements.
    pub endpoint_every: u64,
    /// Guidance of the samples compared, for the endpoint error and the grid.
    pub guidance: f64,
    /// Draw one grid at the end, for the prompts of `[validation]`: teacher in 50 and in 4 steps, student in 4 and
    /// in 1.
    pub grid: bool,
}

impl Default for Report {
    fn default() -> Self {
        Self {
            endpoint_captions: 0,
            endpoint_every: 50,
            guidance: 5.0,
            grid: false,
        }
    }
}

/// `[track]`: who else is told how the run goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Track {
    /// Write TensorBoard events into the run's folder. `--report_to`
    pub tensorboard: bool,
}

impl Default for Track {
    fn default() -> Self {
        Self { tensorboard: true }
    }
}

/// `[metrics]`: who can look on while a run goes on. No flags.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Where Prometheus's `/metrics`, and `/healthz`, are served; absent: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
}

/// `[hub]`: where the finished student goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hub {
    /// Repository of the Hub that it is pushed to, as `user/model`; absent: none. `--push_to_hub`, `--hub_model_id`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub push_to: Option<String>,
}

/// `[latents]`: what `precompute` writes; `train` ignores it. No flags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latents {
    /// Folder, or prefix in S3, for the latent shards and their manifest.
    pub output: PathBuf,
    /// What is kept of a caption.
    #[serde(default = "embeds")]
    pub text: TextKind,
    /// Random crops of each sample.
    #[serde(default = "one_crop")]
    pub crops: usize,
}

fn embeds() -> TextKind {
    TextKind::Embeds
}

fn one_crop() -> usize {
    1
}

/// `[audit]`: what the step saw and made, written out so that anyone can replay it. Without the table nothing is
/// written. No flags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Audit {
    /// Folder for the audit files.
    pub dir: PathBuf,
    /// Steps audited, from the first.
    #[serde(default = "audit_steps")]
    pub steps: u64,
}

fn audit_steps() -> u64 {
    4
}
