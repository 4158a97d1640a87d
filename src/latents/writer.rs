//! Deals encoded batches to the shards their samples belong to, and keeps the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use coffey_pipeline::order::{EpochPlan, Order};
use coffey_pipeline::{ShardSummary, ShardUrl};

use super::LatentError;
use super::aside::remove_leftover;
use super::manifest::{Manifest, Recipe, ShardEntry};
use super::sample::{NotF16, json_with_crop, npy, to_f16};
use super::shard::ShardFile;
use super::skipped::SkippedFile;
use crate::encode::EncodedBatch;

/// Reasons for which a sample is left out only after it was chosen: it counts towards `max_samples`.
const LEFT_OUT_WHEN_DECODED: [&str; 2] = ["decode_error", "too_large"];

/// A sample's extensions with their contents, in the order of the shard.
type Members = Vec<(&'static str, Vec<u8>)>;

/// This process among those that share the shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
}

impl Part {
    /// All of it: there is one process.
    pub const WHOLE: Self = Self { rank: 0, world: 1 };

    /// The name of this process's file among those of the same `stem` and `extension`.
    fn file_name(self, stem: &str, extension: &str) -> String {
        match self.world {
            1 => format!("{stem}.{extension}"),
            world => format!("{stem}-{}-of-{world}.{extension}", self.rank),
        }
    }

    /// Indices of the shards that are this process's, as the stream would deal them.
    fn shards(self, count: usize) -> Vec<usize> {
        let plan = EpochPlan {
            seed: 0,
            shards: count,
            rank: self.rank,
            world: self.world,
            order: Order::Sequential,
            resample: false,
        };
        plan.shards(0)
    }
}

/// Writes one process's part of a folder of latent shards. Dropping it removes the shards that are not finished.
#[derive(Debug)]
pub struct LatentWriter {
    folder: PathBuf,
    manifest_path: PathBuf,
    manifest: Manifest,
    part: Part,
    remaining: Vec<ShardUrl>,
    open: BTreeMap<usize, ShardFile>,
    skipped: SkippedFile,
}

impl LatentWriter {
    /// Makes the folder ready for latents of `shards`, which are those of all processes: finds out what is there
    /// already, removes what a killed run left, and writes the manifest.
    ///
    /// A shard counts as there if a manifest of the folder lists it and its file has the listed size. Its content is
    /// not read again.
    ///
    /// # Errors
    /// When latents of another recipe or other files are in the way, or the folder can't be written.
    pub fn open(
        folder: &Path,
        recipe: Recipe,
        part: Part,
        shards: &[ShardUrl],
    ) -> Result<Self, LatentError> {
        check_names(shards)?;
        std::fs::create_dir_all(folder).map_err(LatentError::io(folder))?;
        let present = Manifest::read_all(folder)?;
        for (name, manifest) in &present {
            manifest.check(&folder.join(name), &recipe)?;
        }
        let skipped = folder.join(part.file_name("skipped", "jsonl"));
        let mut writer = Self {
            folder: folder.to_owned(),
            manifest_path: folder.join(part.file_name("manifest", "json")),
            manifest: Manifest::new(recipe),
            part,
            remaining: Vec::new(),
            open: BTreeMap::new(),
            skipped: SkippedFile::new(skipped),
        };
        remove_leftover(&writer.manifest_path)?;
        for index in part.shards(shards.len()) {
            writer.look_for(&shards[index], &present)?;
        }
        let finished: BTreeSet<String> = part
            .shards(shards.len())
            .into_iter()
            .map(|index| &shards[index])
            .filter(|url| writer.manifest.shards.contains_key(&url.name()))
            .map(ShardUrl::redacted)
            .collect();
        writer.skipped.keep(&finished)?;
        // From here on the folder is known to hold latents.
        writer.manifest.write(&writer.manifest_path)?;
        Ok(writer)
    }

    /// Puts a shard among the finished or the remaining ones.
    fn look_for(
        &mut self,
        url: &ShardUrl,
        present: &BTreeMap<String, Manifest>,
    ) -> Result<(), LatentError> {
        let name = url.name();
        let path = self.folder.join(&name);
        remove_leftover(&path)?;
        let size = match std::fs::metadata(&path) {
            Ok(file) => Some(file.len()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(LatentError::io(&path)(error)),
        };
        if size.is_some() && present.is_empty() {
            return Err(LatentError::Occupied { path });
        }
        for (manifest, listed) in present {
            let Some(entry) = listed.shards.get(&name) else {
                continue;
            };
            if entry.source != url.to_string() {
                return Err(LatentError::OtherSource {
                    manifest: self.folder.join(manifest),
                    name,
                    written: entry.source.clone(),
                    now: url.to_string(),
                });
            }
            if Some(entry.bytes) == size {
                self.manifest.shards.insert(name, entry.clone());
                return Ok(());
            }
        }
        self.remaining.push(url.clone());
        Ok(())
    }

    /// The shards to read, in order: batches that are written count their shards by this list.
    pub fn remaining(&self) -> &[ShardUrl] {
        &self.remaining
    }

    /// The manifest as it is on the disk.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What this process may still read of `max_samples` samples over all processes; `None`: all there is.
    pub fn remaining_samples(&self) -> Option<u64> {
        let max = self.manifest.recipe.selection.max_samples?;
        let (rank, world) = (self.part.rank as u64, self.part.world as u64);
        let share = max / world + u64::from(rank < max % world);
        let read = |entry: &ShardEntry| {
            let undecodable = LEFT_OUT_WHEN_DECODED
                .iter()
                .filter_map(|&reason| entry.skipped.get(reason));
            entry.samples + undecodable.sum::<u64>()
        };
        Some(share.saturating_sub(self.manifest.shards.values().map(read).sum()))
    }

    /// Appends a batch to its shards and finishes those that end with it. Returns the names of those.
    ///
    /// # Errors
    /// When a number can't be stored, before anything of the batch is written; or when the disk fails.
    pub fn write(&mut self, batch: &EncodedBatch) -> Result<Vec<String>, LatentError> {
        let records = self.records(batch)?;
        for (sample, record) in batch.samples.iter().zip(&records) {
            let members = record
                .iter()
                .map(|(extension, content)| (*extension, content.as_slice()));
            self.shard_file(sample.shard)?
                .append(&sample.key, members)?;
        }
        self.skipped.add(&batch.skipped);
        batch
            .finished_shards
            .iter()
            .map(|summary| self.finish(summary))
            .collect()
    }

    fn records(&self, batch: &EncodedBatch) -> Result<Vec<Members>, LatentError> {
        let recipe = &self.manifest.recipe;
        let moments = rows(&batch.moments, batch.samples.len(), &recipe.latent.shape)?;
        let embeds = match &recipe.prompt_embeds_shape {
            Some(shape) => Some((
                shape,
                rows(&batch.prompt_embeds, batch.samples.len(), shape)?,
            )),
            None => None,
        };
        let record = |(row, sample): (usize, &coffey_pipeline::SampleMeta)| {
            let array = |what, shape: &[usize], values: &[f32]| {
                let values =
                    to_f16(values).map_err(|NotF16(value, reason)| LatentError::NotF16 {
                        shard: self.remaining[sample.shard].to_string(),
                        key: sample.key.to_string(),
                        what,
                        value,
                        reason,
                    })?;
                npy(shape, values).map_err(LatentError::io(&self.folder))
            };
            let mut members = vec![(
                "latent.npy",
                array("moments", &recipe.latent.shape, &moments[row])?,
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
            Entry::Vacant(place) => {
                let path = self.folder.join(self.remaining[shard].name());
                Ok(place.insert(ShardFile::create(&path)?))
            }
        }
    }

    fn finish(&mut self, summary: &ShardSummary) -> Result<String, LatentError> {
        let url = &self.remaining[summary.shard];
        let (source, name) = (url.to_string(), url.name());
        let redacted = url.redacted();
        let file = match self.open.remove(&summary.shard) {
            Some(file) => file,
            // Nothing of it could be used.
            None => ShardFile::create(&self.folder.join(&name))?,
        };
        if file.samples() != summary.samples {
            return Err(LatentError::Miscounted {
                shard: source,
                written: file.samples(),
                expected: summary.samples,
            });
        }
        let written = file.finish()?;
        let entry = ShardEntry {
            source,
            samples: summary.samples,
            skipped: summary.skipped.clone(),
            broken: summary.broken.clone(),
            bytes: written.bytes,
            sha256: written.sha256,
        };
        // Before the manifest: lines of a shard that it does not list are dropped again.
        self.skipped.finish(summary.shard, &redacted)?;
        self.manifest.shards.insert(name.clone(), entry);
        self.manifest.write(&self.manifest_path)?;
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
    Ok(tensor.flatten_from(1)?.to_vec2()?)
}

/// Refuses inputs that would meet in one output, or have no name to give it.
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
