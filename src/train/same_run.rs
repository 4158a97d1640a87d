//! Whether all ranks make the same run: the same configuration, models and weights.

use serde::{Deserialize, Serialize};

use super::{TrainError, TrainState};
use crate::config::Config;
use crate::params::ParamSet;
use crate::ranks::{Collective, Patience, RanksError};

/// Numbers that are hashed at once.
const HASHED_AT_ONCE: usize = 1 << 14;

/// The ranks of a run, compared with rank 0. Every rank makes the same comparisons; rank 0 finds the differences.
#[derive(Clone, Copy, Debug)]
pub(super) struct SameRun<'a> {
    pub(super) collective: &'a dyn Collective,
    pub(super) patience: Patience,
}

/// What a rank starts with.
#[derive(Serialize, Deserialize)]
struct Start {
    version: String,
    /// TOML.
    configuration: String,
}

impl SameRun<'_> {
    /// Refuses ranks whose configurations would make other numbers than that of rank 0.
    pub(super) fn check_configuration(self, config: &Config) -> Result<(), TrainError> {
        if self.collective.rank().world == 1 {
            return Ok(());
        }
        let own = Start {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            configuration: config
                .to_toml()
                .map_err(|error| TrainError::Mismatch(error.to_string()))?,
        };
        for (rank, start) in self.gathered::<Start>(&own)? {
            if start.version != own.version {
                return Err(differ(rank, "coffey", &start.version, &own.version));
            }
            let differences = config.differences(&start.configuration);
            let differences = differences.map_err(|cause| RanksError::Message { rank, cause })?;
            if let Some(first) = differences.first() {
                return Err(differ(rank, &first.key, &first.was, &first.now));
            }
        }
        Ok(())
    }

    /// Refuses ranks that have another `value` of `what` than rank 0.
    pub(super) fn check_equal<T: Serialize>(self, what: &str, value: &T) -> Result<(), TrainError> {
        let text = |error: serde_json::Error| TrainError::Mismatch(error.to_string());
        let own = serde_json::to_string(value).map_err(text)?;
        for (rank, found) in self.gathered::<String>(&own)? {
            if found != own {
                return Err(differ(rank, what, &found, &own));
            }
        }
        Ok(())
    }

    /// Ends a run of ranks whose weights are not those of rank 0 to the last bit.
    pub(super) fn check_weights(self, state: &TrainState) -> Result<(), TrainError> {
        if self.collective.rank().world == 1 {
            return Ok(());
        }
        let sets = [Some(state.student.params()), state.student.target_params()];
        self.check_params(state.step, sets.into_iter().flatten())
    }

    fn check_params<'p>(
        self,
        step: u64,
        sets: impl Iterator<Item = &'p ParamSet>,
    ) -> Result<(), TrainError> {
        let mut hash = 0;
        for params in sets {
            for (_, var) in params.iter() {
                let numbers = var.as_detached_tensor().flatten_all()?.to_vec1::<f32>()?;
                for numbers in numbers.chunks(HASHED_AT_ONCE) {
                    hash = crc32c::crc32c_append(hash, bytemuck::cast_slice(numbers));
                }
            }
        }
        for (rank, found) in self.gathered::<u32>(&hash)? {
            if found != hash {
                let drifted = format!(
                    "after step {step}, rank {rank} has other weights than rank 0 (crc32c {found:08x} and {hash:08x})"
                );
                return Err(RanksError::Drifted(drifted).into());
            }
        }
        Ok(())
    }

    /// Rank 0's `text`, on every rank.
    pub(super) fn text_of_rank_0(self, text: &str) -> Result<String, TrainError> {
        let message = text.as_bytes().to_vec();
        let received = self.collective.broadcast(message, self.patience)?;
        String::from_utf8(received).map_err(|error| {
            let cause = error.to_string();
            RanksError::Message { rank: 0, cause }.into()
        })
    }

    /// The values of the ranks after rank 0, on rank 0; none elsewhere.
    fn gathered<T: Serialize + for<'de> Deserialize<'de>>(
        self,
        value: &T,
    ) -> Result<Vec<(usize, T)>, TrainError> {
        let unreadable = |rank: usize| {
            move |error: serde_json::Error| RanksError::Message {
                rank,
                cause: error.to_string(),
            }
        };
        let own = self.collective.rank().index;
        let message = serde_json::to_vec(value).map_err(unreadable(own))?;
        let messages = self.collective.gather(message, self.patience)?;
        let messages = messages.unwrap_or_default();
        let others = messages.iter().enumerate().skip(1);
        others
            .map(|(rank, message)| {
                let value = serde_json::from_slice(message).map_err(unreadable(rank))?;
                Ok((rank, value))
            })
            .collect()
    }
}

fn differ(rank: usize, what: &str, its: &str, ours: &str) -> TrainError {
    let message = format!(
        "rank {rank} makes another run than rank 0: its {what} is {its}, and that of rank 0 is {ours}"
    );
    RanksError::Differ(message).into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::params::Tensors;
    use crate::ranks::threads::on_ranks;

    #[test]
    fn rank_with_another_bit_in_a_weight_is_named() {
        let check = |changed: usize| {
            on_ranks(4, |collective| {
                let rank = collective.rank().index;
                let last = if rank == changed { 3.000_000_2 } else { 3.0 };
                let weights = Tensor::new(&[1f32, 2.0, last], &Device::Cpu).unwrap();
                let set = ParamSet::new(&Tensors::from([("w".to_owned(), weights)])).unwrap();
                let same_run = SameRun {
                    collective: &collective,
                    patience: Patience::ForLife(Duration::from_secs(60)),
                };
                let checked = same_run.check_params(7, std::iter::once(&set));
                checked.map_err(|error| error.to_string())
            })
        };
        assert!(check(4).iter().all(Result::is_ok));
        let found = check(2);
        let error = found[0].as_ref().unwrap_err();
        assert!(
            error.starts_with("after step 7, rank 2 has other weights than rank 0"),
            "{error}"
        );
        assert!(found[1..].iter().all(Result::is_ok), "rank 0 ends the job");
    }
}
