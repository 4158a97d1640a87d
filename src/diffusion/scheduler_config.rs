//! `scheduler_config.json`: what of it decides the forward process, and what is refused.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::json;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::schedule::{Prediction, single};
use crate::models::{did_you_mean, fingerprint_text, nearest_key, numbers, warn_once};

/// Faults of a scheduler's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The file can't be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is malformed or describes no schedule.
    #[error("{path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The fault and its remedy.
        message: String,
    },
}

/// The keys of diffusers' schedulers. A pipeline may name any scheduler; the keys that [`SchedulerConfig`] lacks matter to sampling alone.
const KEYS: &[&str] = &[
    "algorithm_type",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "num_train_timesteps",
    "original_inference_steps",
    "predict_x0",
    "prediction_type",
    "rescale_betas_zero_snr",
    "rho",
    "sample_max_value",
    "set_alpha_to_one",
    "shift_terminal",
    "sigma_data",
    "sigma_max",
    "sigma_min",
    "sigma_schedule",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "thresholding",
    "time_shift_type",
    "timestep_scaling",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
];

/// Keys with the numbers that they may have.
const NUMBERS: [(&str, RangeInclusive<f64>); 3] = [
    ("num_train_timesteps", 2.0..=MOST_TIMESTEPS as f64),
    ("beta_start", 0.0..=1.0),
    ("beta_end", 0.0..=1.0),
];
const MOST_TIMESTEPS: usize = 100_000;

/// How the names of diffusers' schedulers begin that have no betas, or change them: their files read as a schedule of betas would be
/// another model's.
const OTHER_PROCESSES: [&str; 16] = [
    "Amused",
    "CMStochasticIterative",
    "CogVideoX",
    "CosineDPMSolver",
    "DDPMWuerstchen",
    "EDM",
    "FlowMa", // FlowMatch…, FlowMap…
    "Helios",
    "IPNDM",
    "KarrasVe",
    "LTX",
    "Piflow",
    "SCM",
    "ScoreSde",
    "UnCLIP",
    "VQDiffusion",
];

/// The keys of `scheduler_config.json` that decide the schedule, with `DDPMScheduler`'s defaults.
#[derive(serde::Deserialize)]
#[serde(default)]
pub(super) struct SchedulerConfig {
    pub(super) num_train_timesteps: usize,
    pub(super) beta_start: f64,
    pub(super) beta_end: f64,
    pub(super) beta_schedule: String,
    pub(super) trained_betas: Option<Vec<f64>>,
    pub(super) prediction_type: Prediction,
    pub(super) rescale_betas_zero_snr: bool,
    pub(super) set_alpha_to_one: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.0001,
            beta_end: 0.02,
            beta_schedule: "linear".to_owned(),
            trained_betas: None,
            prediction_type: Prediction::Epsilon,
            rescale_betas_zero_snr: false,
            set_alpha_to_one: true,
        }
    }
}

impl SchedulerConfig {
    /// `path` is named in warnings.
    pub(super) fn parse(bytes: &[u8], path: &Path) -> std::result::Result<Self, String> {
        let map: Map<String, Value> = json::from_slice(bytes).map_err(|e| e.to_string())?;
        check_keys(&map, path)?;
        json::from_slice(bytes).map_err(|e| e.to_string())
    }
}

/// The keys of `scheduler_config.json` that training depends on, with their defaults filled in and long lists hashed.
///
/// # Errors
/// As [`NoiseSchedule::read`](super::NoiseSchedule::read).
pub fn scheduler_settings(folder: &Path) -> std::result::Result<Map<String, Value>, ScheduleError> {
    in_file(folder, |bytes, path| {
        let file = SchedulerConfig::parse(bytes, path)?;
        let betas = file.trained_betas.map(|betas| {
            let mut sha = Sha256::new();
            for beta in betas {
                sha.update(single(beta).to_le_bytes());
            }
            fingerprint_text(sha)
        });
        let settings = serde_json::json!({
            "num_train_timesteps": file.num_train_timesteps,
            "beta_start": file.beta_start,
            "beta_end": file.beta_end,
            "beta_schedule": file.beta_schedule,
            "trained_betas": betas,
            "prediction_type": file.prediction_type,
            "rescale_betas_zero_snr": file.rescale_betas_zero_snr,
        });
        match settings {
            Value::Object(settings) => Ok(settings),
            _ => Ok(Map::new()),
        }
    })
}

/// Refuses, all at once, what makes another forward process and keys that are misspelled. Other unknown keys are ignored with a warning, as
/// in diffusers.
fn check_keys(
    map: &serde_json::Map<String, serde_json::Value>,
    path: &Path,
) -> std::result::Result<(), String> {
    let mut faults = Vec::new();
    let mut ignored = Vec::new();
    let class = map.get("_class_name").and_then(|name| name.as_str());
    if let Some(class) = class.filter(|name| OTHER_PROCESSES.iter().any(|c| name.starts_with(c))) {
        faults.push(format!(
            "\"_class_name\": \"{class}\" is no schedule of betas (it is of flow matching or another process), and coffey trains on no \
             other; supported: DDPMScheduler, DDIMScheduler, PNDMScheduler and those that diffusers calls compatible"
        ));
    }
    if map.get("use_flow_sigmas") == Some(&true.into()) {
        faults.push(
            "\"use_flow_sigmas\": true is not supported: the model was trained by flow matching"
                .to_owned(),
        );
    }
    for (key, range) in &NUMBERS {
        let number = map.get(*key).filter(|value| value.is_number());
        if let Some(number) = number
            && !number.as_f64().is_some_and(|n| range.contains(&n))
        {
            faults.push(format!(
                "\"{key}\": {number} is not supported; supported: {}",
                numbers(range)
            ));
        }
    }
    // Keys with a leading underscore are notes of the library that wrote the file.
    let unknown = |key: &&String| !key.starts_with('_') && !KEYS.contains(&key.as_str());
    for key in map.keys().filter(unknown) {
        match nearest_key(key, KEYS) {
            None => ignored.push(format!("\"{key}\"")),
            nearest => faults.push(format!(
                "\"{key}\" is not a key of diffusers' schedulers{}",
                did_you_mean(nearest)
            )),
        }
    }
    if !faults.is_empty() {
        return Err(faults.join("; "));
    }
    if !ignored.is_empty() {
        let (path, keys) = (path.display(), ignored.join(", "));
        warn_once(format!(
            "{path}: {keys}: not a key of diffusers' schedulers, ignored as diffusers does"
        ));
    }
    Ok(())
}

/// The result of `parse` for the bytes and the path of `scheduler_config.json` in `folder`.
pub(super) fn in_file<T>(
    folder: &Path,
    parse: impl FnOnce(&[u8], &Path) -> std::result::Result<T, String>,
) -> std::result::Result<T, ScheduleError> {
    let path = folder.join("scheduler_config.json");
    match bounded::read_file(&path, MAX_FILE_BYTES) {
        Ok(bytes) => {
            parse(&bytes, &path).map_err(|message| ScheduleError::Invalid { path, message })
        }
        Err(source) => Err(ScheduleError::Io { path, source }),
    }
}
