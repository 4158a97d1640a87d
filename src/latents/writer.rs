//! Deals encoded batches to the shards their samples belong to, and keeps the manifest.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};
use coffey_pipeline::destination::Destination;
use coffey_pipeline::{ShardSummary, ShardUrl, SkippedSample};

use super::LatentError;
use super::manifest::{Manifest, Recipe, ShardEntry};
use super::parts::{Inventory, Joined, join, manifest_name, shards_of};
use super::sample::{NotF16, json_with_crop, npy, to_f16};
use super::shard::ShardFile;
use super::skipped::{self, Skipped};
use crate::encode::EncodedBatch;
use crate::ranks::Rank;

/// A sample's extensions with their contents, in the order of the shard.
type Members = Vec<(&'static str, Vec<u8>)>;

/// Writes one process's part of the latent shards of a place. Dropping it leaves nothing of the shards that are not
/// finished.
#[derive(Debug)]
pub struct LatentWriter {
    place: Destination,
    rank: Rank,
    /// Those of all processes.
    shards: Vec<ShardUrl>,
    /// As it is in the place, once there is something to write.
    manifest: Manifest,
    remaining: Vec<ShardUrl>,
    open: BTreeMap<usize, ShardFile>,
    skipped: Skipped,
}

impl LatentWriter {
    /// Makes the place ready for latents of `shards`, which are those of all processes: finds out what is there already,
    /// removes what a killed run left of this part, and announces it in a manifest.
    ///
    /// A shard counts as there if a manifest of the place lists it and its object has the listed size. Its content is
    /// not read again.
    ///
    /// # Errors
    /// When latents of another recipe or other files are in the way, or the place can't be written.
    pub fn open(
        place: Destination,
        recipe: Recipe,
        rank: Rank,
        shards: Vec<ShardUrl>,
    ) -> Result<Self, LatentError> {
        check_names(&shards)?;
        let inventory = Inventory::take(&place)?;
        inventory.check(&recipe)?;
        let finished = inventory.finished()?;
        let mut manifest = Manifest::new(recipe);
        if rank == Rank::SOLO {
            // Shards of an earlier, longer list of inputs stay listed.
            manifest.shards = finished.clone();
        }
        let mut remaining = Vec::new();
        for url in shards_of(rank, &shards) {
            let name = url.name();
            inventory.check_free(&name)?;
            inventory.check_source(url)?;
            match finished.get(&name) {
                Some(entry) => drop(manifest.shards.insert(name, entry.clone())),
                None => remaining.push(url.clone()),
            }
        }
        if !remaining.is_empty() {
            let own: BTreeSet<String> = remaining
                .iter()
                .map(ShardUrl::name)
                .flat_map(|name| [skipped::file_name(&name), name])
                .collect();
            place.abort_incomplete_uploads(|object| own.contains(object))?;
            // From here on the place is known to hold latents.
            manifest.write(&place, &manifest_name(rank))?;
        }
        Ok(Self {
            place,
            rank,
            shards,
            manifest,
            remaining,
            open: BTreeMap::new(),
            skipped: Skipped::default(),
        })
    }

    /// The shards to read, in order: batches that are written count their shards by this list.
    pub fn remaining(&self) -> &[ShardUrl] {
        &self.remaining
    }

    /// What is listed of this process's shards.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What this process may still read of its share of `max_samples`; `None`: all there is.
    pub fn remaining_samples(&self) -> Option<u64> {
        self.manifest.remaining_samples(self.rank, &self.shards)
    }

    /// Appends a batch to its shards and finishes those that end with it. Returns the names of those.
    ///
    /// # Errors
    /// When a number can't be stored, before anything of the batch is written; or when the place fails.
    pub fn write(&mut self, batch: &EncodedBatch) -> Result<Vec<String>, LatentError> {
        let records = self.records(batch)?;
        for (sample, record) in batch.samples.iter().zip(&records) {
            let members = record
                .iter()
                .map(|(extension, content)| (*extension, content.as_slice()));
            self.shard_file(sample.shard)?
                .append(&sample.key, members)?;
        }
        self.finish_shards(&batch.skipped, &batch.finished_shards)
    }

    /// Finishes shards of which nothing more will come, as the end of [`LatentWriter::write`] does; what was left out since
    /// the batch before is `skipped`.
    ///
    /// # Errors
    /// When the place fails.
    pub fn finish_shards(
        &mut self,
        skipped: &[SkippedSample],
        shards: &[ShardSummary],
    ) -> Result<Vec<String>, LatentError> {
        self.skipped.add(skipped);
        let finished = shards.iter().map(|summary| self.finish_shard(summary));
        finished.collect()
    }

    /// Ends this process's work: [`join`]s the manifests if no other process's shards are missing.
    ///
    /// # Errors
    /// As [`join`].
    pub fn finish(self) -> Result<Joined, LatentError> {
        join(&self.place, &self.shards)
    }

    fn records(&self, batch: &EncodedBatch) -> Result<Vec<Members>, LatentError> {
        let recipe = &self.manifest.recipe;
        let crops = recipe.image.crops;
        let count = batch.samples.len() * crops;
        let moments = rows(&batch.moments, count, &recipe.latent.shape)?;
        let shape = recipe.latent_file_shape();
        let embeds = match &recipe.prompt_embeds_shape {
            Some(shape) => Some((
                shape,
                rows(&batch.conditioning.hidden, batch.samples.len(), shape)?,
            )),
            None => None,
        };
        let record = |(row, sample): (usize, &coffey_pipeline::SampleMeta)| {
            let array = |what, shape: &[usize], values: &[f32]| {
                let values =
                    to_f16(values).map_err(|NotF16(value, reason)| LatentError::NotF16 {
                        shard: self.remaining[sample.shard].redacted(),
                        key: sample.key.to_string(),
                        what,
                        value,
                        reason,
                    })?;
                let name = self.remaining[sample.shard].name();
                npy(shape, values)
                    .map_err(|error| LatentError::from(self.place.failed(&name, error)))
            };
            let mut members = vec![(
                "latent.npy",
                array("moments", &shape, &moments[row * crops..][..crops].concat())?,
            )];
            if let Some((shape, embeds)) = &embeds {
                members.push((
                    "prompt_embeds.npy",
                    array("prompt embeddings", *shape, &embeds[row])?,
                ));
            }
            members.push(("txt", sample.caption.clone().into_bytes()));
            let json = json_with_crop(sample, recipe.image.resolution);
            members.push(("json", json.to_string().into_bytes()));
            Ok(members)
        };
        batch.samples.iter().enumerate().map(record).collect()
    }

    fn shard_file(&mut self, shard: usize) -> Result<&mut ShardFile, LatentError> {
        use std::collections::btree_map::Entry;
        match self.open.entry(shard) {
            Entry::Occupied(file) => Ok(file.into_mut()),
            Entry::Vacant(vacant) => {
                let name = self.remaining[shard].name();
                Ok(vacant.insert(ShardFile::create(&self.place, &name)?))
            }
        }
    }

    fn finish_shard(&mut self, summary: &ShardSummary) -> Result<String, LatentError> {
        let url = &self.remaining[summary.shard];
        let (source, name) = (url.redacted(), url.name());
        let file = match self.open.remove(&summary.shard) {
            Some(file) => file,
            // Nothing of it could be used.
            None => ShardFile::create(&self.place, &name)?,
        };
        if file.samples() != summary.samples {
            return Err(LatentError::Miscounted {
                shard: source,
                written: file.samples(),
                expected: summary.samples,
            });
        }
        // Before the shard: what is listed in the manifest is complete.
        self.skipped
            .finish(&self.place, summary.shard, &name, &source)?;
        let written = file.finish()?;
        let entry = ShardEntry {
            source,
            samples: summary.samples,
            skipped: summary.skipped.clone(),
            broken: summary.broken.clone(),
            bytes: written.bytes,
            sha256: written.sha256,
        };
        self.manifest.shards.insert(name.clone(), entry);
        self.manifest
            .write(&self.place, &manifest_name(self.rank))?;
        Ok(name)
    }
}

/// Each sample's values, of a tensor that must be `[count, shape…]`.
fn rows(tensor: &Tensor, count: usize, shape: &[usize]) -> Result<Vec<Vec<f32>>, LatentError> {
    let expected = [&[count], shape].concat();
    if tensor.dims() != expected {
        let message = format!("shape {:?}, expected {expected:?}", tensor.dims());
        return Err(candle_core::Error::Msg(message).into());
    }
    Ok(tensor.flatten_from(1)?.to_device(&Device::Cpu)?.to_vec2()?)
}

/// Refuses inputs that would meet in one output, or have no name to give it.
fn check_names(shards: &[ShardUrl]) -> Result<(), LatentError> {
    let mut seen = BTreeMap::new();
    for url in shards {
        let name = url.name();
        if name.is_empty() {
            return Err(LatentError::NoName {
                url: url.redacted(),
            });
        }
        if let Some(first) = seen.insert(name.clone(), url) {
            return Err(LatentError::SameName {
                name,
                first: first.redacted(),
                second: url.redacted(),
            });
        }
    }
    Ok(())
}
