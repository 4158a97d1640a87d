//! The output of a pack: which shards are there, and of which files they are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::PackError;
use crate::destination::Destination;
use crate::json::from_slice;
use crate::plural::counted;
use crate::shard::ShardUrl;
use crate::source::SourceError;

/// Marks an output of `coffey pack`.
const MARKER: &str = "pack.json";
/// The reason of packed samples in [`Stats::status_dict`].
const SUCCESS: &str = "success";

/// The name of shard number `index`.
pub(super) fn shard_name(index: usize) -> String {
    format!("{index:05}.tar")
}

fn stats_name(shard: &str) -> String {
    format!("{}_stats.json", shard.trim_end_matches(".tar"))
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Marker {
    made_by: String,
    samples_per_shard: usize,
}

/// Counts of a shard, with img2dataset's keys. Written after the shard.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Stats {
    /// Samples of the folder, packed or not.
    pub(super) count: u64,
    pub(super) successes: u64,
    /// Samples by result.
    status_dict: BTreeMap<String, u64>,
    /// Size of the shard.
    pub(super) bytes: u64,
    /// Hash of the shard; empty if it has no sample and is not written.
    pub(super) sha256: String,
    /// Hash of the names, sizes and times of the files it was made of.
    pub(super) files: String,
}

impl Stats {
    pub(super) fn succeed(&mut self) {
        self.count += 1;
        self.successes += 1;
        *self.status_dict.entry(SUCCESS.to_owned()).or_default() += 1;
    }

    pub(super) fn leave_out(&mut self, reason: String) {
        self.count += 1;
        *self.status_dict.entry(reason).or_default() += 1;
    }

    pub(super) fn left_out(&self) -> impl Iterator<Item = (&String, &u64)> {
        self.status_dict
            .iter()
            .filter(|(reason, _)| *reason != SUCCESS)
    }
}

/// The output, with the sizes of its objects when packing began.
pub(super) struct PackedPlace {
    pub(super) destination: Destination,
    sizes: BTreeMap<String, u64>,
}

impl PackedPlace {
    /// Checks that the output is empty or holds a pack of as many shards, and marks it.
    pub(super) fn open(
        place: &Destination,
        samples_per_shard: usize,
        shards: usize,
    ) -> Result<Self, PackError> {
        let occupied = |name: &str, cause: String| PackError::Occupied {
            place: place.place(name),
            cause,
        };
        let entries = place.list("")?;
        let sizes: BTreeMap<_, _> = entries.into_iter().map(|e| (e.name, e.size)).collect();
        let marker = Marker {
            made_by: "coffey pack".to_owned(),
            samples_per_shard,
        };
        let is_marked = sizes.contains_key(MARKER);
        if is_marked {
            match from_slice::<Marker>(&place.read(MARKER)?) {
                Ok(there) if there == marker => {}
                Ok(Marker {
                    samples_per_shard, ..
                }) => {
                    return Err(PackError::OtherSize {
                        place: place.place(MARKER),
                        samples_per_shard,
                        out: place.to_string(),
                    });
                }
                Err(error) => return Err(occupied(MARKER, format!("can't be read: {error}"))),
            }
        }
        let own: Vec<String> = (0..shards).map(shard_name).collect();
        let is_shard = |name: &&String| !name.contains('/') && ShardUrl::file(name).is_shard();
        for name in sizes.keys().filter(is_shard) {
            if !is_marked {
                return Err(occupied(name, "was not made by coffey pack".to_owned()));
            }
            if !own.contains(name) {
                let cause = format!(
                    "was made of other files: {} to be made now",
                    counted(shards, "shard")
                );
                return Err(occupied(name, cause));
            }
        }
        if !is_marked {
            place.write(MARKER, &as_json(place, MARKER, &marker)?)?;
        }
        place.abort_incomplete_uploads(|object| own.iter().any(|name| name == object))?;
        Ok(Self {
            destination: place.clone(),
            sizes,
        })
    }

    /// The counts of a shard that an earlier run finished; `None` if it has to be made.
    pub(super) fn finished(&self, shard: &str, files: &str) -> Result<Option<Stats>, PackError> {
        let name = stats_name(shard);
        if !self.sizes.contains_key(&name) {
            return Ok(None);
        }
        let Ok(stats) = from_slice::<Stats>(&self.destination.read(&name)?) else {
            return Ok(None);
        };
        let size = self.sizes.get(shard).copied();
        if stats.files != files && size.is_some() {
            return Err(PackError::Occupied {
                place: self.destination.place(shard),
                cause: "was made of other files, or of files that have changed since".to_owned(),
            });
        }
        let is_whole = size.unwrap_or(0) == stats.bytes && stats.files == files;
        Ok(is_whole.then_some(stats))
    }

    /// Writes the counts of a shard, which make it finished.
    pub(super) fn finish(&self, shard: &str, stats: &Stats) -> Result<(), PackError> {
        let name = stats_name(shard);
        let json = as_json(&self.destination, &name, stats)?;
        self.destination.write(&name, &json)?;
        if stats.successes == 0 && self.sizes.contains_key(shard) {
            self.destination.remove(shard)?;
        }
        Ok(())
    }

    /// Removes the counts of a shard, so that the next run makes it again.
    pub(super) fn unfinish(&self, shard: &str) -> Result<(), PackError> {
        self.destination.remove(&stats_name(shard))?;
        Ok(())
    }

    /// Removes the counts of all `shards` and the mark, from an output without samples.
    pub(super) fn clear(&self, shards: usize) -> Result<(), PackError> {
        for shard in (0..shards).map(shard_name) {
            self.unfinish(&shard)?;
        }
        self.destination.remove(MARKER)?;
        Ok(())
    }
}

fn as_json(
    place: &Destination,
    name: &str,
    value: &impl Serialize,
) -> Result<Vec<u8>, SourceError> {
    let text = serde_json::to_vec_pretty(value);
    text.map_err(|error| place.failed(name, error.into()))
}
