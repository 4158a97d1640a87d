//! Learning-rate schedules, as diffusers' `optimization.py`.

use std::f64::consts::PI;

use crate::config::{Optimizer, Schedule};

/// The rate that step `step` (from 1) of `max_steps` is made with.
pub(super) fn learning_rate(settings: &Optimizer, step: u64, max_steps: u64) -> f64 {
    let done = step.saturating_sub(1) as f64;
    let (warmup, total) = (settings.warmup_steps as f64, max_steps as f64);
    let rate = settings.learning_rate;
    if settings.schedule == Schedule::Constant {
        return rate;
    }
    if done < warmup {
        return rate * done / warmup.max(1.0);
    }
    let progress = (done - warmup) / (total - warmup).max(1.0);
    match settings.schedule {
        Schedule::Constant | Schedule::ConstantWithWarmup => rate,
        Schedule::Linear => rate * (1.0 - progress).max(0.0),
        Schedule::Cosine => rate * (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
        Schedule::CosineWithRestarts if progress >= 1.0 => 0.0,
        Schedule::CosineWithRestarts => {
            rate * (0.5 * (1.0 + (PI * progress.fract()).cos())).max(0.0)
        }
        Schedule::Polynomial if progress > 1.0 => POLYNOMIAL_END,
        Schedule::Polynomial => (rate - POLYNOMIAL_END) * (1.0 - progress) + POLYNOMIAL_END,
    }
}

/// Where the polynomial schedule (of power 1) ends.
const POLYNOMIAL_END: f64 = 1e-7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_diffusers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/diffusion.json");
        let golden: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let golden = &golden["learning_rates"];
        for schedule in [
            Schedule::Constant,
            Schedule::ConstantWithWarmup,
            Schedule::Linear,
            Schedule::Cosine,
            Schedule::CosineWithRestarts,
            Schedule::Polynomial,
        ] {
            let settings = Optimizer {
                learning_rate: golden["learning_rate"].as_f64().unwrap(),
                warmup_steps: golden["warmup_steps"].as_u64().unwrap(),
                schedule,
                ..Optimizer::default()
            };
            let name = serde_json::to_value(schedule).unwrap();
            let want = golden[name.as_str().unwrap()].as_array().unwrap();
            for (i, want) in want.iter().enumerate() {
                let got = learning_rate(
                    &settings,
                    i as u64 + 1,
                    golden["max_steps"].as_u64().unwrap(),
                );
                let want = want.as_f64().unwrap();
                assert!(
                    (got - want).abs() < 1e-12,
                    "{schedule:?}, step {}: {got}, diffusers has {want}",
                    i + 1
                );
            }
        }
    }
}
