//! The manifests of a place: one for all shards, or one for each process until they are joined.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use coffey_pipeline::destination::Destination;
use coffey_pipeline::order::{EpochPlan, Lanes, Order};
use coffey_pipeline::{ShardUrl, SourceError};
use sha2::{Digest, Sha256};

use super::manifest::{Manifest, Recipe, ShardEntry};
use super::{LatentError, skipped};
use crate::ranks::Rank;

/// Name of the manifest of all shards.
pub(super) const MANIFEST: &str = "manifest.json";
/// How often manifests are listed again if another process joins them meanwhile.
const LISTINGS: usize = 5;
const HASH_BUFFER: usize = 1 << 18;

/// The name of the manifest of a rank.
pub(super) fn manifest_name(rank: Rank) -> String {
    match rank.world {
        1 => MANIFEST.to_owned(),
        world => format!("manifest-{}-of-{world}.json", rank.index),
    }
}

/// The shards of a rank, in order, as the stream deals them.
pub(super) fn shards_of(rank: Rank, all: &[ShardUrl]) -> impl Iterator<Item = &ShardUrl> {
    let plan = EpochPlan {
        seed: 0,
        shards: all.len(),
        lane: rank.index,
        lanes: rank.world,
        order: Order::Sequential,
        resample: false,
    };
    plan.shards(0).into_iter().map(|index| &all[index])
}

/// A rank's share of `max_samples`.
pub(super) fn share_of(rank: Rank, max_samples: u64) -> u64 {
    Lanes::one(rank.index, rank.world).share(rank.index, max_samples)
}

/// The content of a place: its manifests and the sizes of its objects.
#[derive(Debug)]
pub(super) struct Inventory {
    place: Destination,
    manifests: BTreeMap<String, Manifest>,
    sizes: BTreeMap<String, u64>,
}

impl Inventory {
    pub(super) fn take(place: &Destination) -> Result<Self, LatentError> {
        // Objects are listed before manifests: every listed shard then has a manifest, which is written before it.
        let sizes = place.list("")?.into_iter().map(|e| (e.name, e.size));
        Ok(Self {
            place: place.clone(),
            sizes: sizes.collect(),
            manifests: manifests(place)?,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.manifests.is_empty()
    }

    /// The file names of the manifests.
    pub(super) fn manifests(&self) -> impl Iterator<Item = &String> {
        self.manifests.keys()
    }

    /// The recipe of all manifests; `None` without manifests.
    ///
    /// # Errors
    /// [`LatentError::OtherRecipe`] if two manifests have different recipes.
    pub(super) fn recipe(&self) -> Result<Option<&Recipe>, LatentError> {
        let Some(first) = self.manifests.values().next() else {
            return Ok(None);
        };
        self.check(&first.recipe)?;
        Ok(Some(&first.recipe))
    }

    /// Refuses a recipe that differs from that of a manifest.
    pub(super) fn check(&self, recipe: &Recipe) -> Result<(), LatentError> {
        self.manifests
            .iter()
            .try_for_each(|(name, manifest)| manifest.check(&self.place.place(name), recipe))
    }

    /// As [`Inventory::check`], except for the manifest `own` while it lists no shard: nothing was written by its recipe.
    pub(super) fn check_unless_empty(&self, recipe: &Recipe, own: &str) -> Result<(), LatentError> {
        let manifests = self.manifests.iter();
        manifests
            .filter(|(name, manifest)| *name != own || !manifest.shards.is_empty())
            .try_for_each(|(name, manifest)| manifest.check(&self.place.place(name), recipe))
    }

    /// Whether there is an object of this name.
    pub(super) fn holds(&self, name: &str) -> bool {
        self.sizes.contains_key(name)
    }

    /// Refuses to overwrite an object of this name if there are no manifests.
    pub(super) fn check_free(&self, name: &str) -> Result<(), LatentError> {
        if self.sizes.contains_key(name) && self.is_empty() {
            return Err(LatentError::Occupied {
                object: self.place.place(name),
            });
        }
        Ok(())
    }

    /// Refuses a shard that a manifest lists with another input.
    pub(super) fn check_source(&self, url: &ShardUrl) -> Result<(), LatentError> {
        let name = url.name();
        for (manifest, listed) in &self.manifests {
            if let Some(entry) = listed.shards.get(&name)
                && entry.source != url.to_string()
            {
                return Err(LatentError::OtherSource {
                    manifest: self.place.place(manifest),
                    written: entry.source.clone(),
                    now: url.to_string(),
                    name,
                });
            }
        }
        Ok(())
    }

    /// The entries of the finished shards, by name: listed in a manifest, with an object of the listed size. Contents are
    /// read only if two manifests have different entries for a shard, which happens if two machines wrote it.
    pub(super) fn finished(&self) -> Result<BTreeMap<String, ShardEntry>, LatentError> {
        let mut finished = BTreeMap::new();
        for (name, entry) in self.manifests.values().flat_map(|m| &m.shards) {
            if self.sizes.get(name) != Some(&entry.bytes) || finished.get(name) == Some(entry) {
                continue;
            }
            if finished.contains_key(name) && self.sha256(name)? != entry.sha256 {
                continue;
            }
            finished.insert(name.clone(), entry.clone());
        }
        Ok(finished)
    }

    fn sha256(&self, name: &str) -> Result<String, LatentError> {
        let mut object = self.place.open(name)?;
        let (mut sha, mut buffer) = (Sha256::new(), vec![0; HASH_BUFFER]);
        loop {
            match object.read(&mut buffer) {
                Ok(0) => return Ok(format!("{:x}", sha.finalize())),
                Ok(count) => sha.update(&buffer[..count]),
                Err(error) => return Err(self.place.failed(name, error).into()),
            }
        }
    }
}

/// The finished and the missing shards of all processes.
#[derive(Debug)]
pub struct Joined {
    /// The manifests of all processes as one.
    pub manifest: Manifest,
    /// Inputs whose shard is not finished, in order.
    pub missing: Vec<ShardUrl>,
}

/// If the shards of all `shards` are finished, replaces the manifests of the processes by `manifest.json` and removes the
/// leftovers of killed processes. Changes nothing while shards are missing.
///
/// # Errors
/// When there are no manifests, their recipes differ, or the place fails.
pub fn join(place: &Destination, shards: &[ShardUrl]) -> Result<Joined, LatentError> {
    let inventory = Inventory::take(place)?;
    let recipe = inventory.recipe()?.ok_or_else(|| LatentError::Nothing {
        place: place.to_string(),
    })?;
    for url in shards {
        inventory.check_source(url)?;
    }
    let manifest = Manifest {
        shards: inventory.finished()?,
        ..Manifest::new(recipe.clone())
    };
    let missing = manifest.missing(shards);
    if missing.is_empty() {
        manifest.write(place, MANIFEST)?;
        for name in inventory.manifests().filter(|name| *name != MANIFEST) {
            place.remove(name)?;
        }
        let names: BTreeSet<String> = shards
            .iter()
            .map(ShardUrl::name)
            .flat_map(|name| [skipped::file_name(&name), name])
            .collect();
        place.abort_incomplete_uploads(|object| is_manifest(object) || names.contains(object))?;
    }
    Ok(Joined { manifest, missing })
}

impl Manifest {
    /// The unfinished shards among `shards`. Shards of a process that has read its share of `max_samples` do not count.
    fn missing(&self, shards: &[ShardUrl]) -> Vec<ShardUrl> {
        let selection = &self.recipe.selection;
        let world = selection.world.unwrap_or(1);
        let used_up: BTreeSet<String> = (0..world)
            .filter_map(|index| Rank::new(index, world))
            .filter(|&rank| self.remaining_samples(rank, shards) == Some(0))
            .flat_map(|rank| shards_of(rank, shards).map(ShardUrl::name))
            .collect();
        let there = |name: &String| self.shards.contains_key(name) || used_up.contains(name);
        let missing = shards.iter().filter(|url| !there(&url.name()));
        missing.cloned().collect()
    }

    /// The unread rest of a rank's share of `max_samples`; `None` without a limit.
    pub(super) fn remaining_samples(&self, rank: Rank, shards: &[ShardUrl]) -> Option<u64> {
        let share = share_of(rank, self.recipe.selection.max_samples?);
        let read: u64 = shards_of(rank, shards)
            .filter_map(|url| self.shards.get(&url.name()))
            .map(ShardEntry::counted)
            .sum();
        Some(share.saturating_sub(read))
    }
}

/// The manifests of a place, by file name.
fn manifests(place: &Destination) -> Result<BTreeMap<String, Manifest>, LatentError> {
    let mut listings = 0;
    'listing: loop {
        listings += 1;
        let mut manifests = BTreeMap::new();
        for entry in place.list("manifest")? {
            if !is_manifest(&entry.name) {
                continue;
            }
            match place.read(&entry.name) {
                // Another process has joined the manifests since they were listed.
                Err(SourceError::NotFound { .. }) if listings < LISTINGS => continue 'listing,
                text => {
                    let manifest =
                        Manifest::parse(&text?).map_err(|message| LatentError::Manifest {
                            manifest: place.place(&entry.name),
                            message,
                        })?;
                    manifests.insert(entry.name, manifest);
                }
            }
        }
        return Ok(manifests);
    }
}

/// `manifest.json` or `manifest-RANK-of-WORLD.json`.
pub(super) fn is_manifest(name: &str) -> bool {
    name == MANIFEST || (name.starts_with("manifest-") && name.ends_with(".json"))
}
