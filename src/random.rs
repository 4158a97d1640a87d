//! Random numbers for training: drawn from a generator named by seed, purpose, step and place, never by thread or time.

use candle_core::{Device, Result, Tensor};
use coffey_pipeline::order::rng::{Rng, rng};
use rand_distr::{Distribution, StandardNormal};

/// The generator for one purpose at one place.
pub fn generator(seed: u64, purpose: &str, a: u64, b: u64) -> Rng {
    rng(seed, purpose, a, b)
}

/// Standard normal numbers of a shape, `f32`.
///
/// # Errors
/// When the device can't hold them.
pub fn normal(rng: &mut Rng, shape: &[usize], device: &Device) -> Result<Tensor> {
    let data: Vec<f32> = StandardNormal
        .sample_iter(rng)
        .take(shape.iter().product())
        .collect();
    Tensor::from_vec(data, shape, device)
}

/// A uniform number in `from..to`, made of 53 random bits.
pub fn uniform(rng: &mut Rng, from: f64, to: f64) -> f64 {
    use rand_core::RngCore;
    from + (to - from) * (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
