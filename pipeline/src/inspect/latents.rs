//! Report on latent shards: shapes, and statistics of the values.

use std::collections::BTreeMap;

use half::f16;
use serde::Serialize;

use crate::format::Npy;

/// Arrays of latent shards.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct LatentReport {
    /// Samples with latents.
    pub samples: u64,
    /// Samples with a value that is NaN or infinite. The statistics leave such values out.
    pub not_finite: u64,
    /// Arrays by member, type and shape, as `latent.npy <f2 [8, 64, 64]`.
    pub arrays: BTreeMap<String, u64>,
    /// For each channel of the moments, first mean, then log-variance: over all samples and positions.
    pub channels: Vec<ChannelStats>,
}

/// Mean and standard deviation of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ChannelStats {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    #[serde(skip)]
    count: f64,
    #[serde(skip)]
    squares: f64,
}

impl ChannelStats {
    /// Adds the statistics of other values (Chan, Golub and LeVeque 1983).
    fn merge(&mut self, other: &Self) {
        let count = self.count + other.count;
        if other.count == 0.0 {
            return;
        }
        let apart = other.mean - self.mean;
        self.mean += apart * other.count / count;
        self.squares += other.squares + apart * apart * self.count * other.count / count;
        self.count = count;
        self.std = (self.squares / count).sqrt();
    }

    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (count, sum) = values
            .clone()
            .fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value));
        if count == 0.0 {
            return Self::default();
        }
        let mean = sum / count;
        let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
        Self {
            mean,
            std: (squares / count).sqrt(),
            count,
            squares,
        }
    }
}

/// An f16 array.
#[derive(Debug)]
pub(super) struct F16Values {
    values: Vec<f16>,
    shape: Vec<usize>,
}

impl F16Values {
    pub(super) fn are_finite(&self) -> bool {
        self.values.iter().all(|value| value.is_finite())
    }
}

impl LatentReport {
    /// Adds another shard's report.
    pub fn merge(&mut self, other: &Self) {
        self.samples += other.samples;
        self.not_finite += other.not_finite;
        for (array, count) in &other.arrays {
            *self.arrays.entry(array.clone()).or_default() += count;
        }
        self.add_channels(&other.channels);
    }

    fn add_channels(&mut self, channels: &[ChannelStats]) {
        if self.channels.is_empty() {
            self.channels = vec![ChannelStats::default(); channels.len()];
        }
        if self.channels.len() == channels.len() {
            for (all, one) in self.channels.iter_mut().zip(channels) {
                all.merge(one);
            }
        }
    }

    /// Counts the array of the member `extension`. Returns its f16 values and its shape.
    ///
    /// # Errors
    /// A description of the array's fault.
    pub(super) fn add_array(&mut self, extension: &str, file: &[u8]) -> Result<F16Values, String> {
        let array = Npy::open(file).map_err(|error| error.to_string())?;
        let values = array.values().map_err(|error| error.to_string())?;
        let (dtype, shape) = (array.dtype(), array.shape().to_vec());
        *self
            .arrays
            .entry(format!("{extension} {dtype} {shape:?}"))
            .or_default() += 1;
        let Some(values) = values else {
            return Err(format!(
                "{extension} is {dtype} {shape:?}, and not <f2 in C order"
            ));
        };
        Ok(F16Values { values, shape })
    }

    /// Adds the statistics of a sample's moments, `[C, h, w]` or `[crops, C, h, w]`.
    ///
    /// # Errors
    /// A description of the array's fault.
    pub(super) fn add_moments(
        &mut self,
        extension: &str,
        moments: &F16Values,
    ) -> Result<(), String> {
        let F16Values { values, shape } = moments;
        let &[.., channels, height, width] = shape.as_slice() else {
            return Err(format!(
                "{extension} has the shape {shape:?}, and not [channels, height, width]"
            ));
        };
        let (plane, channels) = (height * width, channels.max(1));
        let of = |channel: usize| {
            let planes = values.chunks_exact(plane.max(1)).skip(channel);
            let numbers = planes.step_by(channels).flatten();
            ChannelStats::of(
                numbers
                    .filter(|value| value.is_finite())
                    .map(|value| f64::from(value.to_f32())),
            )
        };
        let channels: Vec<ChannelStats> = (0..channels).map(of).collect();
        self.add_channels(&channels);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_stats_merge_as_one() {
        let numbers = [1.0, 2.0, 4.0, 8.0, -3.0];
        let whole = ChannelStats::of(numbers.into_iter());
        let mut parts = ChannelStats::of(numbers[..2].iter().copied());
        parts.merge(&ChannelStats::default());
        parts.merge(&ChannelStats::of(numbers[2..].iter().copied()));
        assert!((whole.mean - 2.4).abs() < 1e-12 && (whole.std - 3.611_094).abs() < 1e-5);
        assert!((parts.mean - whole.mean).abs() < 1e-12, "{parts:?}");
        assert!((parts.std - whole.std).abs() < 1e-12, "{parts:?}");
        let mut from_nothing = ChannelStats::default();
        from_nothing.merge(&whole);
        assert!((from_nothing.std - whole.std).abs() < 1e-12);
    }
}
