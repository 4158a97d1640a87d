//! The noise schedule of a teacher, from its `scheduler_config.json`.

use std::path::{Path, PathBuf};

use candle_core::{Result, Tensor};

use super::mix;

/// What a network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The clean latents.
    Sample,
    /// Salimans and Ho's velocity, `α·ε - σ·x₀`.
    VPrediction,
}

/// What can be wrong with a scheduler's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// It can't be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// It is not what it should be.
    #[error("{path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
}

/// `scheduler_config.json`, as far as it decides the schedule; unknown keys belong to samplers.
#[derive(serde::Deserialize)]
#[serde(default)]
struct File {
    num_train_timesteps: usize,
    beta_start: f64,
    beta_end: f64,
    beta_schedule: String,
    trained_betas: Option<Vec<f64>>,
    prediction_type: Prediction,
    rescale_betas_zero_snr: bool,
    set_alpha_to_one: bool,
}

impl Default for File {
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

/// The forward process: how much of the data and of the noise a timestep holds.
#[derive(Clone, Debug)]
pub struct NoiseSchedule {
    alphas_cumprod: Vec<f64>,
    prediction: Prediction,
    final_alpha_cumprod: f64,
}

impl NoiseSchedule {
    /// Reads `scheduler_config.json` from a pipeline's `scheduler` folder. As `DDPMScheduler.from_pretrained`.
    ///
    /// # Errors
    /// When it can't be read or names a schedule that is not known.
    pub fn read(folder: &Path) -> std::result::Result<Self, ScheduleError> {
        let path = folder.join("scheduler_config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ScheduleError::Io {
            path: path.clone(),
            source,
        })?;
        let file = serde_json::from_str(&text).map_err(|e| e.to_string());
        file.and_then(|file| Self::new(&file))
            .map_err(|message| ScheduleError::Invalid { path, message })
    }

    fn new(file: &File) -> std::result::Result<Self, String> {
        let n = file.num_train_timesteps;
        let mut betas: Vec<f64> = match (&file.trained_betas, file.beta_schedule.as_str()) {
            (Some(betas), _) => betas.clone(),
            (None, "linear") => linspace(file.beta_start, file.beta_end, n),
            (None, "scaled_linear") => {
                let roots = linspace(file.beta_start.sqrt(), file.beta_end.sqrt(), n);
                roots.into_iter().map(|b| single(b * b)).collect()
            }
            (None, "squaredcos_cap_v2") => {
                let bar = |t: f64| {
                    ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                        .cos()
                        .powi(2)
                };
                let beta = |i| 1.0 - bar((i + 1) as f64 / n as f64) / bar(i as f64 / n as f64);
                (0..n).map(|i| single(beta(i).min(0.999))).collect()
            }
            (None, other) => {
                return Err(format!(
                    "\"beta_schedule\": \"{other}\" is not supported; supported: linear, scaled_linear, squaredcos_cap_v2"
                ));
            }
        };
        if betas.len() < 2 || betas.len() != n || betas.iter().any(|b| !(0.0..=1.0).contains(b)) {
            return Err(format!(
                "the schedule needs {n} betas between 0 and 1, at least two; it has {}",
                betas.len()
            ));
        }
        if file.rescale_betas_zero_snr {
            betas = rescale_zero_terminal_snr(&betas);
        }
        let alphas_cumprod: Vec<f64> = cumulative(&betas).map(single).collect();
        Ok(Self {
            final_alpha_cumprod: if file.set_alpha_to_one {
                1.0
            } else {
                alphas_cumprod[0]
            },
            prediction: file.prediction_type,
            alphas_cumprod,
        })
    }

    /// Number of timesteps of the forward process.
    pub fn len(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Never true: a schedule has at least two timesteps.
    pub fn is_empty(&self) -> bool {
        self.alphas_cumprod.is_empty()
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// `ᾱ` at a timestep, `1` (or the first one, as the configuration says) before the first.
    pub fn alpha_cumprod(&self, timestep: i64) -> f64 {
        match usize::try_from(timestep) {
            Ok(t) => self.alphas_cumprod[t.min(self.len() - 1)],
            Err(_) => self.final_alpha_cumprod,
        }
    }

    /// `α = √ᾱ` and `σ = √(1-ᾱ)` for each timestep.
    fn alphas_sigmas(&self, timesteps: &[i64]) -> (Vec<f64>, Vec<f64>) {
        let each = timesteps.iter().map(|&t| self.alpha_cumprod(t));
        each.map(|a| (a.sqrt(), (1.0 - a).sqrt())).unzip()
    }

    /// Latents at a timestep: `α·x₀ + σ·ε`. As `DDPMScheduler.add_noise`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[i64]) -> Result<Tensor> {
        let (alphas, sigmas) = self.alphas_sigmas(timesteps);
        mix(&alphas, latents, &sigmas, noise)
    }

    /// The clean latents that a network's `output` at noisy latents `x` stands for. As `get_predicted_original_sample`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn predicted_original(
        &self,
        output: &Tensor,
        x: &Tensor,
        timesteps: &[i64],
    ) -> Result<Tensor> {
        let (alphas, sigmas) = self.alphas_sigmas(timesteps);
        match self.prediction {
            Prediction::Epsilon => {
                let inverse: Vec<f64> = alphas.iter().map(|a| 1.0 / a).collect();
                let ratio: Vec<f64> = sigmas.iter().zip(&alphas).map(|(s, a)| -s / a).collect();
                mix(&inverse, x, &ratio, output)
            }
            Prediction::Sample => Ok(output.clone()),
            Prediction::VPrediction => {
                let sigmas: Vec<f64> = sigmas.iter().map(|s| -s).collect();
                mix(&alphas, x, &sigmas, output)
            }
        }
    }

    /// The noise that a network's `output` at noisy latents `x` stands for. As `get_predicted_noise`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn predicted_noise(
        &self,
        output: &Tensor,
        x: &Tensor,
        timesteps: &[i64],
    ) -> Result<Tensor> {
        let (alphas, sigmas) = self.alphas_sigmas(timesteps);
        match self.prediction {
            Prediction::Epsilon => Ok(output.clone()),
            Prediction::Sample => {
                let inverse: Vec<f64> = sigmas.iter().map(|s| 1.0 / s).collect();
                let ratio: Vec<f64> = alphas.iter().zip(&sigmas).map(|(a, s)| -a / s).collect();
                mix(&inverse, x, &ratio, output)
            }
            Prediction::VPrediction => mix(&alphas, output, &sigmas, x),
        }
    }
}

/// Rounds to `f32`, in which diffusers computes the schedule.
fn single(x: f64) -> f64 {
    f64::from(x as f32)
}

fn linspace(from: f64, to: f64, n: usize) -> Vec<f64> {
    let step = (to - from) / (n.max(2) - 1) as f64;
    (0..n).map(|i| single(from + step * i as f64)).collect()
}

/// Cumulative products of `1 - β`.
fn cumulative(betas: &[f64]) -> impl Iterator<Item = f64> + '_ {
    betas.iter().scan(1.0, |product, &b| {
        *product *= single(1.0 - b);
        Some(*product)
    })
}

/// Moves the last timestep to pure noise (Lin et al. 2023, algorithm 1). As diffusers' `rescale_zero_terminal_snr`.
fn rescale_zero_terminal_snr(betas: &[f64]) -> Vec<f64> {
    let roots: Vec<f64> = cumulative(betas).map(f64::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let rescaled = roots.iter().map(|r| (r - last) * first / (first - last));
    let bars: Vec<f64> = rescaled.map(|r| r * r).collect();
    let mut previous = 1.0;
    bars.into_iter()
        .map(|bar| {
            let beta = 1.0 - bar / previous;
            previous = bar;
            beta
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::golden;
    use super::*;

    fn scaled_linear() -> File {
        File {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".into(),
            ..File::default()
        }
    }

    pub(in crate::diffusion) fn scaled_linear_schedule() -> NoiseSchedule {
        NoiseSchedule::new(&scaled_linear()).unwrap()
    }

    pub(in crate::diffusion) fn with(
        like: &NoiseSchedule,
        prediction: Prediction,
        to_one: bool,
    ) -> NoiseSchedule {
        let final_alpha_cumprod = if to_one { 1.0 } else { like.alphas_cumprod[0] };
        NoiseSchedule {
            prediction,
            final_alpha_cumprod,
            alphas_cumprod: like.alphas_cumprod.clone(),
        }
    }

    #[test]
    fn schedules_equal_diffusers() {
        let golden = golden::load();
        let squared = File {
            beta_schedule: "squaredcos_cap_v2".into(),
            ..File::default()
        };
        let rescaled = File {
            rescale_betas_zero_snr: true,
            ..scaled_linear()
        };
        for (key, file, tolerance) in [
            ("alphas_cumprod", scaled_linear(), 1e-6),
            ("alphas_cumprod.linear", File::default(), 1e-6),
            ("alphas_cumprod.squaredcos_cap_v2", squared, 1e-6),
            ("alphas_cumprod.rescaled_zero_snr", rescaled, 1e-5),
        ] {
            let schedule = NoiseSchedule::new(&file).unwrap();
            let map = golden[key].as_object().unwrap();
            let got: Vec<f64> = map
                .keys()
                .map(|t| schedule.alpha_cumprod(t.parse().unwrap()))
                .collect();
            golden::assert_close(&got, &golden[key], tolerance);
        }
    }

    #[test]
    fn noise_and_predictions_equal_diffusers() -> Result<()> {
        let golden = golden::load();
        let add = &golden["add_noise"];
        let t: Vec<i64> = golden::numbers(&add["t"])
            .into_iter()
            .map(|t| t as i64)
            .collect();
        let schedule = NoiseSchedule::new(&scaled_linear()).unwrap();
        let noisy = schedule.add_noise(
            &golden::tensor(&add["latents"]),
            &golden::tensor(&add["noise"]),
            &t,
        )?;
        golden::assert_close(&golden::flat(&noisy), &add["noisy"], 1e-6);
        let predicted = &golden["predicted"];
        for prediction in [
            Prediction::Epsilon,
            Prediction::Sample,
            Prediction::VPrediction,
        ] {
            let schedule = NoiseSchedule {
                prediction,
                ..schedule.clone()
            };
            let want = &predicted[serde_json::to_value(prediction).unwrap().as_str().unwrap()];
            let (output, sample) = (
                golden::tensor(&predicted["output"]),
                golden::tensor(&add["latents"]),
            );
            let original = schedule.predicted_original(&output, &sample, &t)?;
            golden::assert_close(&golden::flat(&original), &want["original"], 1e-5);
            let noise = schedule.predicted_noise(&output, &sample, &t)?;
            golden::assert_close(&golden::flat(&noise), &want["noise"], 1e-5);
        }
        Ok(())
    }
}
