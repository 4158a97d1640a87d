//! Gradients and variables between ranks: each rank adds up the gradients of its own variables for all, and sends what it has made of them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::{Collective, Outgoing, Patience, RanksError, Shares, TensorForm, TreeSum};
use crate::ops;
use crate::params::{Grads, Tensors};

/// Why tensors could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The ranks could not exchange them.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// The sums over all ranks of the gradients of this rank's own variables, f32: a balanced tree over the ranks in their order. All ranks
/// hold gradients of every variable, of the same shapes. One rank alone keeps its gradients as they are.
///
/// # Errors
/// When a rank does not answer, or a tensor operation fails.
pub fn sum_of_own(
    collective: &dyn Collective,
    shares: &Shares,
    mut gradients: Grads,
    patience: Patience,
) -> Result<Grads, ExchangeError> {
    let rank = collective.rank();
    if rank.world == 1 {
        return Ok(gradients);
    }
    let mut sums = Grads::new();
    for round in shares.rounds() {
        let mut taken = |name: &String| -> candle_core::Result<Tensor> {
            let gradient = gradients.remove(name);
            let gradient = gradient.ok_or_else(|| missing(name))?;
            ops::cast(&gradient, DType::F32)
        };
        let rows = round
            .iter()
            .map(|names| names.iter().map(&mut taken).collect());
        let rows: Vec<Vec<Tensor>> = rows.collect::<candle_core::Result<_>>()?;
        let form: Vec<TensorForm> = rows[rank.index].iter().map(TensorForm::of).collect();
        let expected = vec![form; rank.world];
        let received = collective.exchange(Outgoing::Rows(rows), &expected, patience)?;
        let mut terms: Vec<_> = received.into_iter().map(Vec::into_iter).collect();
        for name in &round[rank.index] {
            let mut sum = TreeSum::default();
            for term in terms.iter_mut().filter_map(Iterator::next) {
                sum.push(term, |earlier, later| earlier.add(&later))?;
            }
            sums.insert(name.clone(), sum.finish().ok_or_else(|| missing(name))?);
        }
    }
    Ok(sums)
}

/// Sends the values of this rank's own variables to every rank, and calls `set` with each value that another rank has sent.
///
/// # Errors
/// As [`sum_of_own`], and an error of `set`.
pub fn send_own(
    collective: &dyn Collective,
    shares: &Shares,
    values: &Tensors,
    patience: Patience,
    mut set: impl FnMut(&str, &Tensor) -> candle_core::Result<()>,
) -> Result<(), ExchangeError> {
    let rank = collective.rank();
    for round in shares.rounds() {
        if rank.world == 1 {
            break;
        }
        let row = |names: &Vec<String>| names.iter().map(|name| values[name].clone()).collect();
        let rows: Vec<Vec<Tensor>> = round.iter().map(row).collect();
        let form = |row: &Vec<Tensor>| row.iter().map(TensorForm::of).collect();
        let expected: Vec<Vec<TensorForm>> = rows.iter().map(form).collect();
        let own = rows.into_iter().nth(rank.index).unwrap_or_default();
        let received = collective.exchange(Outgoing::ToAll(own), &expected, patience)?;
        for (sender, (names, tensors)) in round.iter().zip(received).enumerate() {
            if sender != rank.index {
                let mut values = names.iter().zip(&tensors);
                values.try_for_each(|(name, tensor)| set(name, tensor))?;
            }
        }
    }
    Ok(())
}

/// The sum of one number for each variable, of which every rank has those of its own variables: the same bits for any number of ranks.
///
/// # Errors
/// When a rank does not answer.
pub fn sum_of_all(
    collective: &dyn Collective,
    shares: &Shares,
    own: &BTreeMap<&str, f64>,
    patience: Patience,
) -> Result<f64, RanksError> {
    if collective.rank().world == 1 {
        return Ok(own.values().sum());
    }
    let bytes = own.values().flat_map(|number| number.to_le_bytes());
    let mut sum = Vec::new();
    if let Some(messages) = collective.gather(bytes.collect(), patience)? {
        let mut numbers: Vec<_> = messages.iter().map(|m| m.as_chunks().0.iter()).collect();
        let in_order = shares.owners().map(|(name, owner)| {
            let number = numbers[owner]
                .next()
                .map(|bytes| f64::from_le_bytes(*bytes));
            number.ok_or_else(|| unreadable(owner, format!("it has no number for {name}")))
        });
        sum = in_order.sum::<Result<f64, _>>()?.to_le_bytes().to_vec();
    }
    let sum = collective.broadcast(sum, patience)?;
    let sum = sum.try_into().map(f64::from_le_bytes);
    sum.map_err(|_| unreadable(0, "it is no number".to_owned()))
}

fn unreadable(rank: usize, cause: String) -> RanksError {
    RanksError::Message { rank, cause }
}

fn missing(name: &str) -> candle_core::Error {
    candle_core::Error::Msg(format!("no gradient of {name}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::{Device, Result};

    use super::*;
    use crate::ranks::threads::on_ranks;

    const LANES: usize = 8;
    const PATIENCE: Patience = Patience::ForData(Duration::from_secs(60));

    /// Gradients of one lane: numbers whose sum depends on the order.
    fn lane(lane: usize) -> Grads {
        let tensor = |index: usize| {
            let numbers = (0..50 * (index + 1)).map(|i| {
                let number = ((i * 2_654_435_761 + lane * 97) % 1_000_003) as f32;
                number.sin() * 10f32.powi((i % 7) as i32 - 3)
            });
            let name = format!("weight.{index}");
            (name, Tensor::from_iter(numbers, &Device::Cpu).unwrap())
        };
        (0..9).map(tensor).collect()
    }

    /// The bits of tensors, by name.
    type Bits = Vec<(String, Vec<u32>)>;

    fn bits(tensors: &Tensors) -> Bits {
        let tensors = tensors.iter();
        tensors
            .map(|(name, tensor)| {
                let numbers = tensor.to_vec1::<f32>().unwrap();
                (
                    name.clone(),
                    numbers.into_iter().map(f32::to_bits).collect(),
                )
            })
            .collect()
    }

    /// The sums over all lanes and the sum of their squares, as each of `world` ranks has them in the end.
    fn step(world: usize) -> Vec<(Bits, u64)> {
        on_ranks(world, |collective| {
            let index = collective.rank().index;
            let mut sum = TreeSum::default();
            for hosted in (0..LANES / world).map(|hosted| index * (LANES / world) + hosted) {
                let add = |mut earlier: Grads, later: Grads| -> Result<Grads> {
                    for (name, gradient) in &mut earlier {
                        *gradient = gradient.add(&later[name])?;
                    }
                    Ok(earlier)
                };
                sum.push(lane(hosted), add).unwrap();
            }
            let gradients = sum.finish().unwrap();
            let sizes = gradients
                .iter()
                .map(|(name, x)| (name.as_str(), x.elem_count()));
            let shares = Shares::new(collective.rank(), sizes);
            let mut all = gradients.clone();
            let own = sum_of_own(&collective, &shares, gradients, PATIENCE).unwrap();
            assert!(own.keys().all(|name| shares.owns(name)));
            let squares = own.iter().map(|(name, x)| {
                let numbers = x.to_vec1::<f32>().unwrap().into_iter();
                (name.as_str(), numbers.map(|x| f64::from(x).powi(2)).sum())
            });
            let squares = sum_of_all(&collective, &shares, &squares.collect(), PATIENCE).unwrap();
            all.extend(own);
            let values = all.clone();
            let set = |name: &str, tensor: &Tensor| {
                all.insert(name.to_owned(), tensor.clone());
                Ok(())
            };
            send_own(&collective, &shares, &values, PATIENCE, set).unwrap();
            (bits(&all), squares.to_bits())
        })
    }

    #[test]
    fn number_of_ranks_changes_no_bit_of_a_sum() {
        let one = step(1).remove(0);
        for world in [2, 4, 8] {
            for found in step(world) {
                assert!(found == one, "{world} ranks");
            }
        }
    }
}
