//! The passes of a sampler, counted and checked from outside.

use std::cell::Cell;

use candle_core::Tensor;

use super::SampleError;
use crate::diffusion::{NoisePredictor, Sampler};

/// A predictor with a function that sees the number of each pass, from 1, and its output.
struct Watched<'a> {
    predictor: &'a dyn NoisePredictor,
    on_pass: &'a dyn Fn(usize, &Tensor) -> Result<(), SampleError>,
    passes: Cell<usize>,
    /// The error of `on_pass`, which candle's error has no place for.
    refused: Cell<Option<SampleError>>,
}

impl NoisePredictor for Watched<'_> {
    fn predict(&self, latents: &Tensor, timestep: i64) -> candle_core::Result<Tensor> {
        let output = self.predictor.predict(latents, timestep)?;
        self.passes.set(self.passes.get() + 1);
        if let Err(error) = (self.on_pass)(self.passes.get(), &output) {
            let message = error.to_string();
            self.refused.set(Some(error));
            candle_core::bail!("{message}");
        }
        Ok(output)
    }
}

/// As [`Sampler::sample`], with `on_pass` called after each pass; its error ends the sampling.
pub(super) fn sample_watched(
    sampler: &dyn Sampler,
    predictor: &dyn NoisePredictor,
    noise: &Tensor,
    renoise: &mut dyn FnMut(usize) -> candle_core::Result<Tensor>,
    on_pass: &dyn Fn(usize, &Tensor) -> Result<(), SampleError>,
) -> Result<Tensor, SampleError> {
    let watched = Watched {
        predictor,
        on_pass,
        passes: Cell::new(0),
        refused: Cell::new(None),
    };
    sampler
        .sample(&watched, noise, renoise)
        .map_err(|error| watched.refused.take().unwrap_or(error.into()))
}
