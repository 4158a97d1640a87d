//! The sampler of trajectory consistency distillation.

use candle_core::{Result, Tensor};

use super::{BoundaryScaling, LcmSampler, NoisePredictor, NoiseSchedule, Sampler};

/// Strategic stochastic sampling of trajectory consistency models. As diffusers' `TCDScheduler` with 50 original inference steps.
#[derive(Debug)]
pub struct TcdSampler<'a> {
    schedule: &'a NoiseSchedule,
    gamma: f64,
    timesteps: Vec<i64>,
}

impl<'a> TcdSampler<'a> {
    /// A sampler with the timesteps of [`LcmSampler`]. `gamma`: stochasticity, 0 (deterministic) to 1; `eta` in diffusers.
    pub fn new(schedule: &'a NoiseSchedule, gamma: f64, steps: usize) -> Self {
        let lcm = LcmSampler::new(schedule, BoundaryScaling::default(), steps);
        Self {
            timesteps: lcm.timesteps().to_vec(),
            schedule,
            gamma,
        }
    }

    /// The trajectory's point at `(1-γ)·previous`, from the output at timestep `t`.
    fn denoise(&self, output: &Tensor, x: &Tensor, t: i64, previous: i64) -> Result<(Tensor, i64)> {
        let each = vec![t; x.dim(0)?];
        let original = self.schedule.predicted_original(output, x, &each)?;
        let noise = self.schedule.predicted_noise(output, x, &each)?;
        let destination = ((1.0 - self.gamma) * previous as f64).floor() as i64;
        let each = vec![destination; x.dim(0)?];
        let point = self.schedule.add_noise(&original, &noise, &each)?;
        Ok((point, destination))
    }

    /// Adds noise to a point of timestep `from`, up to timestep `to`.
    fn renoise(&self, x: &Tensor, noise: &Tensor, from: i64, to: i64) -> Result<Tensor> {
        let ratio = self.schedule.alpha_cumprod(to) / self.schedule.alpha_cumprod(from);
        (x * ratio.sqrt())? + (noise * (1.0 - ratio).sqrt())?
    }
}

impl Sampler for TcdSampler<'_> {
    fn steps(&self) -> usize {
        self.timesteps.len()
    }

    fn sample(
        &self,
        predictor: &dyn NoisePredictor,
        noise: &Tensor,
        renoise: &mut dyn FnMut(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = noise.clone();
        for (i, &t) in self.timesteps.iter().enumerate() {
            let output = predictor.predict(&x, t)?;
            let next = self.timesteps.get(i + 1).copied();
            let (point, at) = self.denoise(&output, &x, t, next.unwrap_or(0))?;
            x = match next {
                Some(next) if self.gamma > 0.0 => self.renoise(&point, &renoise(i)?, at, next)?,
                _ => point,
            };
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Prediction;
    use super::super::golden;
    use super::super::schedule::tests::{scaled_linear_schedule, with};
    use super::*;

    #[test]
    fn tcd_steps_equal_diffusers() -> Result<()> {
        let golden = golden::load();
        let row = |value: &serde_json::Value| golden::tensor(&serde_json::json!([value]));
        for (name, prediction) in [
            ("epsilon", Prediction::Epsilon),
            ("v_prediction", Prediction::VPrediction),
        ] {
            let schedule = with(&scaled_linear_schedule(), prediction, true);
            for gamma in [0.0, 0.3, 1.0] {
                let tcd = &golden["tcd"][format!("{name}.{gamma:?}")];
                let sampler = TcdSampler::new(&schedule, gamma, 4);
                let mut x = row(&tcd["start"]);
                for (i, step) in tcd["steps"].as_array().unwrap().iter().enumerate() {
                    let (t, next) = (sampler.timesteps[i], sampler.timesteps.get(i + 1));
                    let output = row(&step["output"]);
                    let (point, at) = sampler.denoise(&output, &x, t, *next.unwrap_or(&0))?;
                    let mut prev = point;
                    if let Some(noise) = step.get("noise") {
                        prev = sampler.renoise(&prev, &row(noise), at, *next.unwrap())?;
                    }
                    golden::assert_close(&golden::flat(&prev), &step["prev"], 1e-5);
                    x = row(&step["prev"]);
                }
            }
        }
        Ok(())
    }
}
