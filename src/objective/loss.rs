//! Distances between a prediction and its target.

use candle_core::{Result, Tensor};

/// A distance between two tensors of one shape, averaged over all their elements.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// Pseudo-Huber: `mean(√(d² + c²) - c)`.
    Huber {
        /// Distance at which the loss turns from quadratic to linear.
        c: f64,
    },
    /// `mean(d²)`.
    L2,
}

impl Loss {
    /// The distance, a scalar in the tensors' dtype with their graph.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn between(self, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        let square = (prediction - target)?.sqr()?;
        match self {
            Self::Huber { c } => ((square + c * c)?.sqrt()? - c)?.mean_all(),
            Self::L2 => square.mean_all(),
        }
    }
}
