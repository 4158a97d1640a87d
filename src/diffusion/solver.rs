//! The DDIM step back along the teacher's trajectory.

use candle_core::{Result, Tensor};

use super::{NoiseSchedule, mix};

/// The reference's `DDIMSolver`: an evenly spaced subset of the timesteps, and one DDIM step between neighbours.
#[derive(Clone, Debug)]
pub struct DdimSolver {
    timesteps: Vec<i64>,
    previous_alphas_cumprod: Vec<f64>,
    stride: i64,
}

impl DdimSolver {
    /// A solver with `steps` timesteps, the last of each of `steps` equal parts of the schedule.
    pub fn new(schedule: &NoiseSchedule, steps: usize) -> Self {
        let stride = (schedule.len() / steps) as i64;
        let timesteps: Vec<i64> = (1..=steps as i64).map(|i| i * stride - 1).collect();
        let previous = std::iter::once(0).chain(timesteps[..steps - 1].iter().copied());
        Self {
            previous_alphas_cumprod: previous.map(|t| schedule.alpha_cumprod(t)).collect(),
            timesteps,
            stride,
        }
    }

    /// Number of timesteps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Whether there are no timesteps.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// The timestep a step starts from, and the one it leads to: `(t_{n+k}, t_n)`.
    pub fn interval(&self, index: usize) -> (i64, i64) {
        let start = self.timesteps[index];
        (start, (start - self.stride).max(0))
    }

    /// One DDIM step (Song et al. 2021, equation 12 with η = 0) from the timestep of each sample's index to the one before.
    ///
    /// `predicted_original` and `predicted_noise`: `[B, C, h, w]`; `index`: one for each sample → `[B, C, h, w]` in their dtype.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn step(
        &self,
        predicted_original: &Tensor,
        predicted_noise: &Tensor,
        index: &[usize],
    ) -> Result<Tensor> {
        let alphas = index.iter().map(|&i| self.previous_alphas_cumprod[i]);
        let (original, noise): (Vec<f64>, Vec<f64>) =
            alphas.map(|a| (a.sqrt(), (1.0 - a).sqrt())).unzip();
        mix(&original, predicted_original, &noise, predicted_noise)
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden;
    use super::super::schedule::tests::scaled_linear_schedule;
    use super::*;

    #[test]
    fn ddim_solver_equals_the_reference() -> Result<()> {
        let schedule = scaled_linear_schedule();
        for steps in [50, 13] {
            let golden = &golden::load()["ddim_solver"][steps.to_string()];
            let solver = DdimSolver::new(&schedule, steps);
            let timesteps: Vec<f64> = solver.timesteps.iter().map(|&t| t as f64).collect();
            golden::assert_close(&timesteps, &golden["timesteps"], 0.0);
            golden::assert_close(
                &solver.previous_alphas_cumprod,
                &golden["alphas_cumprod_prev"],
                1e-6,
            );
            let index: Vec<usize> = golden::numbers(&golden["index"])
                .iter()
                .map(|&i| i as usize)
                .collect();
            let x = solver.step(
                &golden::tensor(&golden["pred_x0"]),
                &golden::tensor(&golden["pred_noise"]),
                &index,
            )?;
            golden::assert_close(&golden::flat(&x), &golden["x_prev"], 1e-6);
        }
        Ok(())
    }
}
