//! Writes encoded batches to the shards of their samples, and updates the manifest.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor};
use coffey_pipeline::destination::Destination;
use coffey_pipeline::format::latents::{F16Member, LatentSample, Member};
use coffey_pipeline::text::escaped;
use coffey_pipeline::{SampleMeta, ShardSummary, ShardUrl, SkippedSample};

use super::LatentError;
use super::half::{NotF16, to_f16};
use super::manifest::{Manifest, Recipe, ShardEntry};
use super::parts::{Inventory, Joined, join, manifest_name, shards_of};
use super::shard::ShardFile;
use super::skipped::{self, Skipped};
use crate::encode::EncodedBatch;
use crate::ranks::Rank;

/// Writes one process's share of the latent shards of a place. Dropping the writer discards unfinished shards.
#[derive(Debug)]
pub struct LatentWriter {
    place: Destination,
    rank: Rank,
    /// Input shards of all processes.
    shards: Vec<ShardUrl>,
    /// The manifest of this process.
    manifest: Manifest,
    remaining: Vec<ShardUrl>,
    open: BTreeMap<usize, ShardFile>,
    skipped: Skipped,
}

impl LatentWriter {
    /// Prepares the place for latents of `shards`, the input shards of all processes: finds the finished shards, removes
    /// unfinished shards of this process and writes its manifest.
    ///
    /// A shard is finished if a manifest of the place lists it and its object has the listed size. The content is not
    /// read again.
    ///
    /// # Errors
    /// When the place holds latents of another recipe or other files, or can't be written.
    pub fn open(
        place: Destination,
        recipe: Recipe,
        rank: Rank,
        shards: Vec<ShardUrl>,
    ) -> Result<Self, LatentError> {
        check_names(&shards)?;
        let inventory = Inventory::take(&place)?;
        inventory.check_unless_empty(&recipe, &manifest_name(rank))?;
        let finished = inventory.finished()?;
        let mut manifest = Manifest::new(recipe);
        if rank == Rank::SOLO {
            // Finished shards that are not among `shards` stay listed.
            manifest.shards = finished.clone();
        }
        let mut remaining = Vec::new();
        for url in shards_of(rank, &shards) {
            let name = url.name();
            inventory.check_free(&name)?;
            inventory.check_source(url)?;
            let list = skipped::file_name(&name);
            if !finished.contains_key(&name) && inventory.holds(&list) {
                // Of a run that ended in an error.
                place.remove(&list)?;
            }
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
            // Written before the first shard, so that the place is known to hold latents.
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

    /// The shards to read, in order. The shards of written batches are indices of this list.
    pub fn remaining(&self) -> &[ShardUrl] {
        &self.remaining
    }

    /// The manifest of this process.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The unread rest of this process's share of `max_samples`; `None` without a limit.
    pub fn remaining_samples(&self) -> Option<u64> {
        self.manifest.remaining_samples(self.rank, &self.shards)
    }

    /// Appends a batch to its shards and finishes the shards that end with it. Returns the names of the finished shards.
    ///
    /// # Errors
    /// When a value can't be stored as f16, before any sample of the batch is written; or when the place fails.
    pub fn write(&mut self, batch: &EncodedBatch) -> Result<Vec<String>, LatentError> {
        let samples = self.members(batch)?;
        for (sample, members) in batch.samples.iter().zip(&samples) {
            self.shard_file(sample.shard)?
                .append(&sample.key, members)?;
        }
        self.finish_shards(&batch.skipped, &batch.finished_shards)
    }

    /// Finishes shards without a batch, as [`LatentWriter::write`] does. `skipped` are the samples skipped since the batch
    /// before.
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

    /// Lists the skipped samples of unfinished shards, for a run that ends in an error. `skipped` are the samples skipped since
    /// the batch before. Returns the places of the lists.
    ///
    /// # Errors
    /// When the place fails.
    pub fn list_skipped(&mut self, skipped: &[SkippedSample]) -> Result<Vec<String>, LatentError> {
        self.skipped.add(skipped);
        let mut lists = Vec::new();
        for shard in self.skipped.shards() {
            let url = &self.remaining[shard];
            let (source, name) = (url.to_string(), url.name());
            self.skipped.finish(&self.place, shard, &name, &source)?;
            lists.push(self.place.place(&skipped::file_name(&name)));
        }
        Ok(lists)
    }

    /// Ends the work of this process: [`join`]s the manifests if all shards of all processes are finished.
    ///
    /// # Errors
    /// As [`join`].
    pub fn finish(self) -> Result<Joined, LatentError> {
        join(&self.place, &self.shards)
    }

    /// The members of each sample of `batch`.
    fn members(&self, batch: &EncodedBatch) -> Result<Vec<Vec<Member>>, LatentError> {
        let recipe = &self.manifest.recipe;
        let (crops, samples) = (recipe.image.crops, batch.samples.len());
        let shape = recipe.latent_file_shape();
        let moments = rows(&batch.moments, samples * crops, &recipe.latent.shape)?;
        let embeds_shape = recipe.prompt_embeds_shape;
        let embeds = match &embeds_shape {
            Some(shape) => rows(&batch.conditioning.hidden, samples, shape)?,
            None => Vec::new(),
        };
        let pooled_shape = recipe.pooled_shape;
        let pooled = match (&pooled_shape, &batch.conditioning.pooled) {
            (Some(shape), Some(pooled)) => rows(pooled, samples, shape)?,
            _ => Vec::new(),
        };
        let members = |(row, sample): (usize, &SampleMeta)| {
            let values = moments[row * crops..][..crops].concat();
            let moments = self.array(sample, "moments", &shape, &values)?;
            let prompt_embeds = match &embeds_shape {
                Some(shape) => {
                    Some(self.array(sample, "prompt embeddings", shape, &embeds[row])?)
                }
                None => None,
            };
            let pooled = match (&pooled_shape, pooled.get(row)) {
                (Some(shape), Some(values)) => {
                    Some(self.array(sample, "pooled text embedding", shape, values)?)
                }
                _ => None,
            };
            let sample_to_write = LatentSample {
                moments,
                prompt_embeds,
                pooled,
                caption: &sample.caption,
                json: sample.json.as_ref(),
                geometry: &sample.geometry,
                resolution: recipe.image.resolution,
            };
            sample_to_write.members().map_err(|error| {
                let name = self.remaining[sample.shard].name();
                self.place.failed(&name, error).into()
            })
        };
        batch.samples.iter().enumerate().map(members).collect()
    }

    /// An array of `sample` as f16. `what` names the array in the error.
    fn array<'a>(
        &self,
        sample: &SampleMeta,
        what: &'static str,
        shape: &'a [usize],
        values: &[f32],
    ) -> Result<F16Member<'a>, LatentError> {
        let values = to_f16(values).map_err(|NotF16(value, reason)| LatentError::NotF16 {
            shard: self.remaining[sample.shard].to_string(),
            key: escaped(&sample.key).into_owned(),
            what,
            value,
            reason,
        })?;
        Ok(F16Member { shape, values })
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
        let (source, name) = (url.to_string(), url.name());
        let file = match self.open.remove(&summary.shard) {
            Some(file) => file,
            // The shard has no usable samples.
            None => ShardFile::create(&self.place, &name)?,
        };
        if file.samples() != summary.samples {
            return Err(LatentError::Miscounted {
                shard: source,
                written: file.samples(),
                expected: summary.samples,
            });
        }
        // Written before the shard, so that each shard in the manifest has its list of skipped samples.
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

/// The values of each row of a tensor `[count, shape…]`, f32.
fn rows(tensor: &Tensor, count: usize, shape: &[usize]) -> Result<Vec<Vec<f32>>, LatentError> {
    let expected = [&[count], shape].concat();
    if tensor.dims() != expected {
        let message = format!("shape {:?}, expected {expected:?}", tensor.dims());
        return Err(candle_core::Error::Msg(message).into());
    }
    Ok(tensor.flatten_from(1)?.to_device(&Device::Cpu)?.to_vec2()?)
}

/// Refuses inputs that would have the same output, and inputs without a file name.
fn check_names(shards: &[ShardUrl]) -> Result<(), LatentError> {
    let mut seen = BTreeMap::new();
    for url in shards {
        let name = url.name();
        if name.is_empty() {
            return Err(LatentError::NoName {
                url: url.to_string(),
            });
        }
        if let Some(first) = seen.insert(name.clone(), url) {
            return Err(LatentError::SameName {
                name,
                first: first.to_string(),
                second: url.to_string(),
            });
        }
    }
    Ok(())
}
