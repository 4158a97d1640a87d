//! Which rank updates which of a run's variables.

use std::collections::BTreeMap;

use super::Rank;

/// Numbers that all ranks exchange at once: 16 MiB of `f32`, which caches hold.
const ROUND: usize = 1 << 22;

/// The variables of a run, each owned by one rank: it holds the variable's moments and updates it for all.
#[derive(Clone, Debug)]
pub struct Shares {
    rank: Rank,
    owners: BTreeMap<String, usize>,
    /// Exchanges that together hold every variable: for each rank the names of its variables, in name order.
    rounds: Vec<Vec<Vec<String>>>,
}

impl Shares {
    /// Divides variables, with their numbers of elements, between the ranks: the largest first, each to the rank that has fewest
    /// elements.
    pub fn new<'a>(rank: Rank, variables: impl Iterator<Item = (&'a str, usize)>) -> Self {
        let sizes: BTreeMap<&str, usize> = variables.collect();
        let mut largest_first: Vec<_> = sizes.iter().collect();
        largest_first.sort_by_key(|(name, size)| (std::cmp::Reverse(**size), **name));
        let mut loads = vec![0; rank.world];
        let mut owners = BTreeMap::new();
        for (name, size) in largest_first {
            let least = (0..rank.world).min_by_key(|rank| loads[*rank]).unwrap_or(0);
            loads[least] += size;
            owners.insert((*name).to_owned(), least);
        }
        let mut rounds: Vec<Vec<Vec<String>>> = Vec::new();
        for owner in 0..rank.world {
            let (mut round, mut numbers) = (0, 0);
            let own = owners.iter().filter(|(_, rank)| **rank == owner);
            for (name, _) in own {
                if rounds.len() == round {
                    rounds.push(vec![Vec::new(); rank.world]);
                }
                rounds[round][owner].push(name.clone());
                numbers += sizes[name.as_str()];
                if numbers >= ROUND / rank.world {
                    (round, numbers) = (round + 1, 0);
                }
            }
        }
        Self {
            rank,
            owners,
            rounds,
        }
    }

    /// Whether this rank owns a variable.
    pub fn owns(&self, name: &str) -> bool {
        self.owners.get(name) == Some(&self.rank.index)
    }

    /// The owner of each variable, in name order.
    pub fn owners(&self) -> impl Iterator<Item = (&str, usize)> {
        let owners = self.owners.iter();
        owners.map(|(name, owner)| (name.as_str(), *owner))
    }

    /// Exchanges that together hold every variable, of about equal size: for each rank the names of its variables, in name order.
    pub fn rounds(&self) -> &[Vec<Vec<String>>] {
        &self.rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_has_one_owner_and_one_round() {
        let names: Vec<String> = (0..40).map(|i| format!("block.{i}")).collect();
        let sizes = |i: usize| 1 + (i * i * 7919) % (ROUND / 3);
        let variables = || {
            names
                .iter()
                .enumerate()
                .map(|(i, n)| (n.as_str(), sizes(i)))
        };
        let shares = |index| Shares::new(Rank { index, world: 4 }, variables());
        let mut loads = [0; 4];
        for (index, load) in loads.iter_mut().enumerate() {
            let shares = shares(index);
            let rounds = shares.rounds();
            let own: Vec<&String> = rounds.iter().flat_map(|round| &round[index]).collect();
            assert!(own.iter().all(|name| shares.owns(name)));
            assert!(own.is_sorted());
            let owned = variables().filter(|(name, _)| shares.owns(name));
            *load = owned.map(|(_, size)| size).sum::<usize>();
        }
        let (total, largest): (usize, usize) =
            (loads.iter().sum(), variables().map(|v| v.1).max().unwrap());
        assert_eq!(total, variables().map(|v| v.1).sum::<usize>());
        assert!(
            loads.iter().max().unwrap() - loads.iter().min().unwrap() <= largest,
            "{loads:?}"
        );
        assert_eq!(shares(0).rounds(), shares(3).rounds());
    }
}
