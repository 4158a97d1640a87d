//! The sum of gradients over the ranks, by the upper levels of the tree over the lanes.

use std::time::Duration;

use candle_core::{DType, Tensor};

use super::{Collective, RanksError, TreeSum};
use crate::ops;
use crate::params::Grads;

/// Numbers that are exchanged at once.
const BUCKET: usize = 1 << 24;

/// Replaces every gradient by its sum over all ranks, f32, the same bits on every rank: a balanced tree over the ranks in their order.
/// All ranks hold gradients of the same names and shapes. `limit`: see [`Collective`].
///
/// Each rank adds one segment of a bucket for all: segments go to their ranks, are summed there, and come back to everyone.
///
/// # Errors
/// When a rank does not answer, or a tensor operation fails.
pub fn sum_over_ranks(
    collective: &dyn Collective,
    gradients: &mut Grads,
    limit: Duration,
) -> Result<(), SumError> {
    let world = collective.rank().world;
    if world == 1 {
        return Ok(());
    }
    let mut bucket = Bucket::default();
    let mut sums = Vec::with_capacity(gradients.len());
    for gradient in gradients.values() {
        bucket.push(gradient)?;
        if bucket.numbers.len() >= BUCKET {
            sums.append(&mut bucket.sum(collective, limit)?);
        }
    }
    sums.append(&mut bucket.sum(collective, limit)?);
    for (gradient, sum) in gradients.values_mut().zip(sums) {
        *gradient = sum;
    }
    Ok(())
}

/// Why gradients could not be summed.
#[derive(Debug, thiserror::Error)]
pub enum SumError {
    /// The ranks could not exchange them.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Gradients that are exchanged at once.
#[derive(Default)]
struct Bucket {
    numbers: Vec<f32>,
    gradients: Vec<Tensor>,
}

impl Bucket {
    fn push(&mut self, gradient: &Tensor) -> candle_core::Result<()> {
        let numbers = ops::cast(gradient, DType::F32)?.flatten_all()?;
        self.numbers.extend(numbers.to_vec1::<f32>()?);
        // The shape and the device alone are needed from here on.
        self.gradients.push(gradient.clone());
        Ok(())
    }

    /// The sums over all ranks, in the order of the gradients. Leaves an empty bucket.
    fn sum(
        &mut self,
        collective: &dyn Collective,
        limit: Duration,
    ) -> Result<Vec<Tensor>, SumError> {
        if self.gradients.is_empty() {
            return Ok(Vec::new());
        }
        let world = collective.rank().world;
        let segment = self.numbers.len().div_ceil(world);
        self.numbers.resize(segment * world, 0.0);
        let mut received = vec![0.0; self.numbers.len()];
        collective.all_to_all(&mut self.numbers, &mut received, limit)?;
        let mut sum = TreeSum::default();
        for row in received.chunks_exact(segment) {
            sum.push(row.to_vec(), |mut earlier: Vec<f32>, later| {
                for (earlier, later) in earlier.iter_mut().zip(later) {
                    *earlier += later;
                }
                Ok(earlier)
            })?;
        }
        let mut own = sum.finish().unwrap_or_default();
        collective.all_gather(&mut own, &mut self.numbers, limit)?;
        let mut sums = Vec::with_capacity(self.gradients.len());
        let mut rest = self.numbers.as_slice();
        for gradient in self.gradients.drain(..) {
            let (numbers, after) = rest.split_at(gradient.elem_count());
            sums.push(Tensor::from_slice(
                numbers,
                gradient.shape(),
                gradient.device(),
            )?);
            rest = after;
        }
        self.numbers.clear();
        Ok(sums)
    }
}
