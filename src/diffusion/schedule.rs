//! The noise schedule of a teacher, from its `scheduler_config.json`.

use std::path::Path;

use candle_core::{Result, Tensor};

use super::mix;
use super::scheduler_config::{ScheduleError, SchedulerConfig, in_file};

/// The prediction type of a network.
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

/// The forward process: the shares of data and noise at each timestep.
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
        in_file(folder, Self::parse)
    }

    fn parse(bytes: &[u8], path: &Path) -> std::result::Result<Self, String> {
        Self::new(&SchedulerConfig::parse(bytes, path)?)
    }
}

impl NoiseSchedule {
    fn new(file: &SchedulerConfig) -> std::result::Result<Self, String> {
        let n = file.num_train_timesteps;
        let mut betas: Vec<f64> = match (&file.trained_betas, file.beta_schedule.as_str()) {
            (Some(betas), _) => betas.iter().copied().map(single).collect(),
            (None, "linear") => linspace(file.beta_start, file.beta_end, n),
            (None, "scaled_linear") => {
                let roots = linspace(file.beta_start.sqrt(), file.beta_end.sqrt(), n);
                roots.into_iter().map(|b| single(b * b)).collect()
            }
            (None, "squaredcos_cap_v2") => from_alpha_bar(n, |t| {
                ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                    .cos()
                    .powi(2)
            }),
            (None, "laplace") => from_alpha_bar(n, |t| {
                let log = (1.0 - 2.0 * (0.5 - t).abs() + 1e-6).ln();
                let snr = (-0.5 * 1f64.copysign(0.5 - t) * log).exp();
                (snr / (1.0 + snr)).sqrt()
            }),
            (None, "sigmoid") => {
                let sigmoid = |x: f64| single(1.0 / (1.0 + (-x).exp()));
                let range = file.beta_end - file.beta_start;
                let beta = |x| single(single(sigmoid(x) * range) + file.beta_start);
                linspace(-6.0, 6.0, n).into_iter().map(beta).collect()
            }
            (None, other) => {
                return Err(format!(
                    "\"beta_schedule\": \"{other}\" is not supported; supported: linear, scaled_linear, squaredcos_cap_v2, laplace, sigmoid"
                ));
            }
        };
        if betas.len() < 2 || betas.len() != n || betas.iter().any(|b| !(0.0..=1.0).contains(b)) {
            return Err(format!(
                "the schedule needs {n} betas between 0 and 1, at least two; it has {}",
                betas.len()
            ));
        }
        if file.rescale_betas_zero_snr && file.prediction_type == Prediction::Epsilon {
            return Err(
                "\"rescale_betas_zero_snr\": true with \"prediction_type\": \"epsilon\": at the last timestep nothing is left of \
                 the latents that predicted noise could give back; \"v_prediction\" and \"sample\" can"
                    .to_owned(),
            );
        }
        if file.rescale_betas_zero_snr {
            betas = rescale_zero_terminal_snr(&betas);
        }
        let alphas_cumprod: Vec<f64> = cumulative(&betas).map(single).collect();
        if file.prediction_type == Prediction::Epsilon {
            refuse_pure_noise(file, &alphas_cumprod)?;
        }
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

    /// Always false: a schedule has at least two timesteps.
    pub fn is_empty(&self) -> bool {
        self.alphas_cumprod.is_empty()
    }

    /// The network's prediction type.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// `ᾱ` at a timestep; before the first, `1` or the first `ᾱ`, as `set_alpha_to_one` says.
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

    /// Noisy latents: `α·x₀ + σ·ε`. As `DDPMScheduler.add_noise`.
    ///
    /// `latents` and `noise`: `[B, C, h, w]`; `timesteps`: one for each sample → `[B, C, h, w]` in their dtype.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn add_noise(&self, latents: &Tensor, noise: &Tensor, timesteps: &[i64]) -> Result<Tensor> {
        let (alphas, sigmas) = self.alphas_sigmas(timesteps);
        mix(&alphas, latents, &sigmas, noise)
    }

    /// The clean latents that a network's `output` at noisy latents `x` stands for. As `get_predicted_original_sample` of
    /// diffusers' `train_lcm_distill_sd_wds.py`.
    ///
    /// `output` and `x`: `[B, C, h, w]`; `timesteps`: one for each sample → `[B, C, h, w]` in their dtype.
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

    /// The noise that a network's `output` at noisy latents `x` stands for. As `get_predicted_noise` of diffusers'
    /// `train_lcm_distill_sd_wds.py`.
    ///
    /// `output` and `x`: `[B, C, h, w]`; `timesteps`: one for each sample → `[B, C, h, w]` in their dtype.
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
                // A timestep without noise: the latents are the sample, and no noise is left to find.
                let over = |number: f64, s: f64| if s > 0.0 { number / s } else { 0.0 };
                let inverse: Vec<f64> = sigmas.iter().map(|&s| over(1.0, s)).collect();
                let both = alphas.iter().zip(&sigmas);
                let ratio: Vec<f64> = both.map(|(&a, &s)| over(-a, s)).collect();
                mix(&inverse, x, &ratio, output)
            }
            Prediction::VPrediction => mix(&alphas, output, &sigmas, x),
        }
    }
}

/// Refuses a timestep with too little left of the latents for predicted noise to give them back: they are divided by `√ᾱ`, and the
/// square of that is a number of f32.
fn refuse_pure_noise(
    file: &SchedulerConfig,
    alphas_cumprod: &[f64],
) -> std::result::Result<(), String> {
    let too_little = |&alpha: &f64| !((1.0 / alpha) as f32).is_finite();
    let Some(timestep) = alphas_cumprod.iter().position(too_little) else {
        return Ok(());
    };
    let betas = match &file.trained_betas {
        Some(_) => "\"trained_betas\"".to_owned(),
        None => format!(
            "\"beta_schedule\": \"{}\" from \"beta_start\": {} to \"beta_end\": {}",
            file.beta_schedule, file.beta_start, file.beta_end
        ),
    };
    Err(format!(
        "{betas}, and \"prediction_type\": \"epsilon\": at timestep {timestep} nothing is left of the latents that predicted noise \
         could give back (alphas_cumprod is {:e}); smaller betas leave something, and \"v_prediction\" and \"sample\" can do without",
        alphas_cumprod[timestep]
    ))
}

/// Rounds to `f32`, in which diffusers computes the schedule.
pub(super) fn single(x: f64) -> f64 {
    f64::from(x as f32)
}

/// `torch.linspace` in f32, bit for bit: a rounded step, counted from the nearer end.
fn linspace(from: f64, to: f64, n: usize) -> Vec<f64> {
    let (from, to) = (single(from), single(to));
    let last = n.max(2) - 1;
    let step = single(single(to - from) / last as f64);
    let at = |i: usize| {
        if i < n / 2 {
            from + step * i as f64
        } else {
            to - step * (last - i) as f64
        }
    };
    (0..n).map(|i| single(at(i))).collect()
}

/// Cumulative products of `1 - β`.
fn cumulative(betas: &[f64]) -> impl Iterator<Item = f64> + '_ {
    betas.iter().scan(1.0, |product, &b| {
        *product *= single(1.0 - b);
        Some(*product)
    })
}

/// Betas of `n` timesteps whose cumulative `1 - β` follow `bar` over time from 0 to 1. As diffusers' `betas_for_alpha_bar`.
fn from_alpha_bar(n: usize, bar: impl Fn(f64) -> f64) -> Vec<f64> {
    let at = |i: usize| bar(i as f64 / n as f64);
    (0..n)
        .map(|i| single((1.0 - at(i + 1) / at(i)).min(0.999)))
        .collect()
}

/// Moves the last timestep to pure noise (Lin et al. 2023, algorithm 1). As diffusers' `rescale_zero_terminal_snr`; its
/// roundings matter near the end, where the share of the latents is small.
fn rescale_zero_terminal_snr(betas: &[f64]) -> Vec<f64> {
    let roots: Vec<f64> = cumulative(betas)
        .map(|bar| single(single(bar).sqrt()))
        .collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = single(first / single(first - last));
    let bar = |root: &f64| {
        let root = single(single(root - last) * scale);
        single(root * root)
    };
    let mut previous = 1.0;
    roots
        .iter()
        .map(|root| {
            let bar = bar(root);
            let beta = single(1.0 - single(bar / previous));
            previous = bar;
            beta
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::golden;
    use super::*;

    fn scaled_linear() -> SchedulerConfig {
        SchedulerConfig {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: "scaled_linear".into(),
            ..SchedulerConfig::default()
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
        let named = |beta_schedule: &str| SchedulerConfig {
            beta_schedule: beta_schedule.into(),
            ..SchedulerConfig::default()
        };
        let rescaled = |file: SchedulerConfig| SchedulerConfig {
            rescale_betas_zero_snr: true,
            prediction_type: Prediction::VPrediction,
            ..file
        };
        let sigmoid = SchedulerConfig {
            beta_start: 0.0002,
            beta_end: 0.03,
            ..named("sigmoid")
        };
        let trained = SchedulerConfig {
            trained_betas: Some((1..=1000).map(|i| f64::from(i * i) * 2e-8).collect()),
            ..named("linear")
        };
        for (key, file) in [
            ("alphas_cumprod", scaled_linear()),
            ("alphas_cumprod.linear", SchedulerConfig::default()),
            (
                "alphas_cumprod.squaredcos_cap_v2",
                named("squaredcos_cap_v2"),
            ),
            ("alphas_cumprod.laplace", named("laplace")),
            ("alphas_cumprod.sigmoid", sigmoid),
            ("alphas_cumprod.trained_betas", trained),
            (
                "alphas_cumprod.rescaled_zero_snr",
                rescaled(scaled_linear()),
            ),
            (
                "alphas_cumprod.rescaled_linear",
                rescaled(SchedulerConfig::default()),
            ),
        ] {
            let schedule = NoiseSchedule::new(&file).unwrap();
            for (t, want) in golden[key].as_object().unwrap() {
                let (t, want) = (t.parse().unwrap(), want.as_f64().unwrap());
                let got = schedule.alpha_cumprod(t);
                // Relative to each number: those near the end are small, and divided by.
                assert!(
                    (got - want).abs() <= 2e-5 * want.abs(),
                    "{key} at {t}: got {got}, diffusers has {want}"
                );
            }
        }
    }

    #[test]
    fn schedule_refuses_configurations_that_make_none() {
        for (text, words) in [
            (
                r#"{"beta_schedule": "cosine"}"#,
                &["cosine", "squaredcos_cap_v2"][..],
            ),
            (
                r#"{"predicton_type": "epsilon", "beta_ent": 1, "use_flow_sigmas": true}"#,
                &[
                    "did you mean \"prediction_type\"",
                    "did you mean \"beta_end\"",
                    "use_flow_sigmas",
                ],
            ),
            (
                r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#,
                &["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"],
            ),
            (
                r#"{"prediction_type": "flow_prediction"}"#,
                &["flow_prediction", "v_prediction"],
            ),
            (r#"{"trained_betas": [0.1, 0.2]}"#, &["1000", "2"]),
            (
                r#"{"beta_end": 1.5}"#,
                &["\"beta_end\": 1.5", "from 0 to 1"],
            ),
            (
                r#"{"rescale_betas_zero_snr": true}"#,
                &["rescale_betas_zero_snr", "v_prediction"],
            ),
            ("[]", &["map"]),
            (
                r#"{"beta_end": -Infinity}"#,
                &["\"beta_end\"", "\"-Infinity\"", "f64"],
            ),
            (
                r#"{"trained_betas": [0.1, NaN]}"#,
                &["\"trained_betas[1]\"", "\"NaN\""],
            ),
            (
                r#"{"beta_end": 1.0}"#,
                &["beta_end", "1", "timestep 390", "v_prediction"],
            ),
            (
                r#"{"beta_schedule": "scaled_linear", "beta_start": 0.5, "beta_end": 0.5}"#,
                &["scaled_linear", "0.5", "timestep 12"],
            ),
            (
                r#"{"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]}"#,
                &["trained_betas", "at timestep 2", "epsilon"],
            ),
        ] {
            let message = NoiseSchedule::parse(text.as_bytes(), Path::new("x")).unwrap_err();
            for word in words {
                assert!(message.contains(word), "{text}: {word:?}? {message}");
            }
        }
        for prediction in ["v_prediction", "sample"] {
            let text = format!(r#"{{"beta_end": 1.0, "prediction_type": "{prediction}"}}"#);
            assert_eq!(
                NoiseSchedule::parse(text.as_bytes(), Path::new("x"))
                    .unwrap()
                    .alpha_cumprod(999),
                0.0
            );
        }
        let pndm = r#"{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": true,
            "set_alpha_to_one": false, "steps_offset": 1, "trained_betas": null, "clip_sample": false}"#;
        let fork = r#"{"_class_name": "LCMSchedulerWithTimestamp", "watermark": "x"}"#;
        let dpm =
            r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
        for text in [pndm, fork, dpm] {
            let schedule = NoiseSchedule::parse(text.as_bytes(), Path::new("x")).unwrap();
            assert_eq!(schedule.len(), 1000);
        }
    }

    #[test]
    fn predictions_are_finite_at_both_ends() -> Result<()> {
        let x = Tensor::new(&[[[[0.5f32]]]], &candle_core::Device::Cpu)?;
        for (prediction, betas) in [
            ("sample", "[0.0, 0.5, 1.0]"),
            ("v_prediction", "[0.0, 0.5, 1.0]"),
            ("epsilon", "[0.0, 0.5, 0.999]"),
        ] {
            let text = format!(
                r#"{{"num_train_timesteps": 3, "trained_betas": {betas}, "prediction_type": "{prediction}"}}"#
            );
            let schedule = NoiseSchedule::parse(text.as_bytes(), Path::new("x")).unwrap();
            for t in 0..3 {
                let original = schedule.predicted_original(&x, &x, &[t])?;
                let noise = schedule.predicted_noise(&x, &x, &[t])?;
                let both = [golden::flat(&original), golden::flat(&noise)].concat();
                assert!(
                    both.iter().all(|n| n.is_finite()),
                    "{prediction} at {t}: {both:?}"
                );
            }
        }
        Ok(())
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
