//! The boundary condition of consistency models: at timestep 0 the model is the identity.

/// `c_skip` and `c_out` of a consistency model, `f(x, t) = c_skip(t)·x + c_out(t)·x̂₀(x, t)`.
///
/// As `scalings_for_boundary_conditions` in diffusers' `train_lcm_distill_sd_wds.py` and Appendix C of Song et al. 2023.
#[derive(Clone, Copy, Debug)]
pub struct BoundaryScaling {
    /// Standard deviation of the data.
    pub sigma_data: f64,
    /// Factor of timesteps: the larger it is, the smaller is the share of the input after timestep 0.
    pub timestep_scaling: f64,
}

impl BoundaryScaling {
    /// `(c_skip, c_out)` at a timestep.
    pub fn at(&self, timestep: i64) -> (f64, f64) {
        let scaled = self.timestep_scaling * timestep as f64;
        let variance = self.sigma_data * self.sigma_data;
        let total = scaled * scaled + variance;
        (variance / total, scaled / total.sqrt())
    }

    /// [`Self::at`] for each timestep.
    pub fn each(&self, timesteps: &[i64]) -> (Vec<f64>, Vec<f64>) {
        timesteps.iter().map(|&t| self.at(t)).unzip()
    }
}

impl Default for BoundaryScaling {
    fn default() -> Self {
        Self {
            sigma_data: 0.5,
            timestep_scaling: 10.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::golden;
    use super::*;

    #[test]
    fn boundary_scalings_equal_diffusers() {
        let golden = &golden::load()["boundary_scalings"];
        let t: Vec<i64> = golden::numbers(&golden["t"])
            .into_iter()
            .map(|t| t as i64)
            .collect();
        let (skip, out) = BoundaryScaling::default().each(&t);
        golden::assert_close(&skip, &golden["c_skip"], 1e-6);
        golden::assert_close(&out, &golden["c_out"], 1e-6);
    }
}
