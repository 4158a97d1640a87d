//! What is in latent shards: shapes, and statistics of the numbers.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::stream::{Array, read_halves};

/// What the arrays of latent shards are.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct LatentReport {
    /// Samples with latents.
    pub samples: u64,
    /// Samples of which some number is NaN or infinite. Such numbers are in no mean.
    pub not_finite: u64,
    /// Arrays by member, type and shape, as `latent.npy <f2 [8, 64, 64]`.
    pub arrays: BTreeMap<String, u64>,
    /// For each channel of the moments, mean's channels first, then log-variance's: over all samples and places.
    pub channels: Vec<Channel>,
}

/// Mean and standard deviation of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Channel {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub std: f64,
    #[serde(skip)]
    count: f64,
    #[serde(skip)]
    squares: f64,
}

impl Channel {
    /// Takes the numbers of another part in (Chan, Golub and LeVeque 1983).
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

impl LatentReport {
    /// Takes another shard's report in.
    pub fn merge(&mut self, other: &Self) {
        self.samples += other.samples;
        self.not_finite += other.not_finite;
        for (array, count) in &other.arrays {
            *self.arrays.entry(array.clone()).or_default() += count;
        }
        self.add_channels(&other.channels);
    }

    fn add_channels(&mut self, channels: &[Channel]) {
        if self.channels.is_empty() {
            self.channels = vec![Channel::default(); channels.len()];
        }
        if self.channels.len() == channels.len() {
            for (all, one) in self.channels.iter_mut().zip(channels) {
                all.merge(one);
            }
        }
    }

    /// Takes a sample's array in, `file` of the member `extension`; of moments the numbers as well. Whether all numbers are finite.
    ///
    /// # Errors
    /// What is wrong with the array, in words.
    pub(super) fn add(
        &mut self,
        extension: &str,
        file: &[u8],
        moments: bool,
    ) -> Result<bool, String> {
        let Array {
            dtype,
            shape,
            values,
        } = read_halves(file)?;
        *self
            .arrays
            .entry(format!("{extension} {dtype} {shape:?}"))
            .or_default() += 1;
        let Some(values) = values else {
            return Err(format!(
                "{extension} is {dtype} {shape:?}, and not <f2 in C order"
            ));
        };
        let finite = values.iter().all(|value| value.is_finite());
        if !moments {
            return Ok(finite);
        }
        // Behind the number of crops, if there are several.
        let &[.., channels, height, width] = shape.as_slice() else {
            return Err(format!(
                "{extension} has the shape {shape:?}, and not [channels, height, width]"
            ));
        };
        let (plane, channels) = (height * width, channels.max(1));
        let of = |channel: usize| {
            let planes = values.chunks_exact(plane.max(1)).skip(channel);
            let numbers = planes.step_by(channels).flatten();
            Channel::of(
                numbers
                    .filter(|value| value.is_finite())
                    .map(|value| f64::from(value.to_f32())),
            )
        };
        let channels: Vec<Channel> = (0..channels).map(of).collect();
        self.add_channels(&channels);
        Ok(finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_merge_as_if_they_were_one() {
        let numbers = [1.0, 2.0, 4.0, 8.0, -3.0];
        let whole = Channel::of(numbers.into_iter());
        let mut parts = Channel::of(numbers[..2].iter().copied());
        parts.merge(&Channel::default());
        parts.merge(&Channel::of(numbers[2..].iter().copied()));
        assert!((whole.mean - 2.4).abs() < 1e-12 && (whole.std - 3.611_094).abs() < 1e-5);
        assert!((parts.mean - whole.mean).abs() < 1e-12, "{parts:?}");
        assert!((parts.std - whole.std).abs() < 1e-12, "{parts:?}");
        let mut from_nothing = Channel::default();
        from_nothing.merge(&whole);
        assert!((from_nothing.std - whole.std).abs() < 1e-12);
    }
}
