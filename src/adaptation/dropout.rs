//! Dropout of the inputs of adapters.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor};

use crate::models::Dropout;
use crate::random::{generator, uniform};

/// Step and micro-batch of the passes that are computed.
pub(super) type Place = Arc<Mutex<(u64, u64)>>;

/// Dropout whose masks are named by seed, network, module, step and micro-batch, so that a block that is computed again in the
/// backward pass has the same mask.
#[derive(Debug)]
pub(super) struct NamedDropout {
    /// Share of the numbers that is set to 0, below 1.
    pub(super) share: f64,
    pub(super) seed: u64,
    /// Name of the network.
    pub(super) network: &'static str,
    pub(super) place: Place,
}

impl Dropout for NamedDropout {
    fn apply(&self, module: &str, x: &Tensor) -> Result<Tensor> {
        let (step, micro_batch) = *self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let purpose = format!("dropout {} {module}", self.network);
        let mut rng = generator(self.seed, &purpose, step, micro_batch);
        let kept = (1.0 / (1.0 - self.share)) as f32;
        let mask: Vec<f32> = (0..x.elem_count())
            .map(|_| match uniform(&mut rng, 0.0, 1.0) < self.share {
                true => 0.0,
                false => kept,
            })
            .collect();
        let mask = Tensor::from_vec(mask, x.shape(), x.device())?;
        x.mul(&mask.to_dtype(x.dtype())?)
    }
}
