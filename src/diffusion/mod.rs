//! The mathematics of diffusion and of Latent Consistency Models: pure functions over tensors.
//!
//! This module owns noise schedules, the DDIM solver of the distillation step, boundary scalings, the guidance embedding and
//! the samplers. It never draws a random number: noise is an argument.

mod boundary;
mod guidance;
mod sampler;
mod schedule;
mod scheduler_config;
mod solver;
mod tcd;

pub use boundary::BoundaryScaling;
pub use guidance::{conditional_and_unconditional, guidance_embedding};
pub use sampler::{
    DdimSampler, LcmSampler, NoisePredictor, Sampler, StudentPredictor, TeacherPredictor, predictor,
};
pub use schedule::{NoiseSchedule, Prediction};
pub use scheduler_config::{ScheduleError, scheduler_settings};
pub use solver::DdimSolver;
pub use tcd::TcdSampler;

use candle_core::{Result, Tensor};

/// One number for each sample, as a tensor that broadcasts over `like` `[B, C, h, w]`: `[B, 1, 1, 1]` in its dtype and on its
/// device.
pub(crate) fn per_sample(values: &[f64], like: &Tensor) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Tensor::from_vec(values, (like.dim(0)?, 1, 1, 1), like.device())?.to_dtype(like.dtype())
}

/// `a·x + b·y` with one `a` and one `b` for each sample.
///
/// `x` and `y`: `[B, C, h, w]` → the same shape and dtype.
pub(crate) fn mix(a: &[f64], x: &Tensor, b: &[f64], y: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&per_sample(a, x)?)? + y.broadcast_mul(&per_sample(b, y)?)?
}

#[cfg(test)]
mod golden {
    //! Comparison with numbers that `tests/reference/make_golden.py` took from diffusers.

    pub(super) fn load() -> serde_json::Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/diffusion.json");
        serde_json::from_str(&std::fs::read_to_string(path).expect(path)).expect(path)
    }

    /// All numbers in a value, in order.
    pub(super) fn numbers(value: &serde_json::Value) -> Vec<f64> {
        match value {
            serde_json::Value::Number(n) => vec![n.as_f64().expect("a number")],
            serde_json::Value::Array(items) => items.iter().flat_map(numbers).collect(),
            serde_json::Value::Object(map) => map.values().flat_map(numbers).collect(),
            other => panic!("not numbers: {other}"),
        }
    }

    pub(super) fn assert_close(got: &[f64], want: &serde_json::Value, tolerance: f64) {
        let want = numbers(want);
        assert_eq!(got.len(), want.len());
        let scale = want.iter().fold(1e-30f64, |a, b| a.max(b.abs()));
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!(
                (g - w).abs() <= tolerance * scale,
                "number {i}: got {g}, diffusers has {w}"
            );
        }
    }

    /// A golden array as a tensor `[rows, 1, 1, rest]`.
    pub(super) fn tensor(value: &serde_json::Value) -> candle_core::Tensor {
        let rows = value.as_array().expect("an array").len();
        let data: Vec<f32> = numbers(value).into_iter().map(|x| x as f32).collect();
        let rest = data.len() / rows;
        candle_core::Tensor::from_vec(data, (rows, 1, 1, rest), &candle_core::Device::Cpu)
            .expect("a tensor")
    }

    pub(super) fn flat(tensor: &candle_core::Tensor) -> Vec<f64> {
        let tensor = tensor
            .flatten_all()
            .and_then(|t| t.to_dtype(candle_core::DType::F64));
        tensor.and_then(|t| t.to_vec1()).expect("numbers")
    }
}
