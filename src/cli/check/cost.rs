//! What a precompute run will read, write and ask for.

use coffey_pipeline::destination::PartOptions;
use coffey_pipeline::{SampleMeta, ShardUrl};
use serde::Serialize;

use crate::cli::Failure;
use crate::cli::data::DataAccess;
use crate::config::{Config, Latents, TextKind, in_s3};

/// Shards whose sizes are asked for, spread over the list: the mean stands for all.
const SIZED: usize = 3;
/// A tar's unit. Bytes.
const BLOCK: u64 = 512;
/// What ends a tar. Bytes.
const TAR_END: u64 = 2 * BLOCK;
/// npy's header of such arrays. Bytes.
const NPY_HEADER: u64 = 128;
/// What is added to a sample's json for one crop. Bytes.
const NOTES: u64 = 190;
/// Names that one answer of a listing holds.
const LISTED: u64 = 1000;

/// Estimates, from a few shards' sizes and the first one's first samples.
#[derive(Debug, Serialize)]
pub(super) struct Cost {
    shards: u64,
    /// Shards whose size was asked for.
    sized: u64,
    input_bytes: u64,
    samples: u64,
    output_bytes: u64,
    /// GET requests, one a shard in S3.
    reads: u64,
    /// PUT and POST requests: shards, in parts if they are large, and the manifest after each.
    writes: u64,
    /// LIST requests.
    lists: u64,
}

/// What was found out of the samples.
pub(super) struct Seen<'a> {
    /// The first one.
    pub(super) sample: &'a SampleMeta,
    /// Mean size of a sample's members. Bytes.
    pub(super) bytes: u64,
    /// `[2C, h, w]`
    pub(super) latent: [usize; 3],
    /// `[T, width]`
    pub(super) prompt_embeds: [usize; 2],
}

impl Cost {
    /// Opens a few shards for their sizes.
    pub(super) fn estimate(
        config: &Config,
        latents: &Latents,
        seen: &Seen<'_>,
        shards: &[ShardUrl],
        data: &DataAccess,
    ) -> Result<Self, Failure> {
        let step = shards.len().div_ceil(SIZED).max(1);
        let mut sizes = Vec::new();
        for url in shards.iter().step_by(step) {
            let reader = data.runtime.block_on(data.sources.open(url))?;
            sizes.extend(reader.size());
        }
        let count = shards.len() as u64;
        let mean = sizes.iter().sum::<u64>() / (sizes.len() as u64).max(1);
        // Image, caption, and json if there is one.
        let members = 2 + u64::from(seen.sample.json.is_some());
        let sample = seen.bytes + members * (BLOCK + BLOCK / 2);
        let all = count * mean / sample.max(1);
        let samples = config.data.max_samples.map_or(all, |max| max.min(all));
        let output = samples * output_sample(latents, seen) + count * TAR_END;
        let remote = |there: bool, requests: u64| if there { requests } else { 0 };
        let written = in_s3(&latents.output);
        let part = PartOptions::default().bytes as u64;
        let shard = match (output / count.max(1)).div_ceil(part) {
            0 | 1 => 1,
            parts => parts + 2,
        };
        let read = shards
            .iter()
            .filter(|url| in_s3(url.to_string().as_ref()))
            .count() as u64;
        Ok(Self {
            shards: count,
            sized: sizes.len() as u64,
            input_bytes: count * mean,
            samples,
            output_bytes: output,
            reads: read,
            writes: remote(written, count * (shard + 1) + 2),
            lists: remote(written, 2 * (1 + count / LISTED)) + remote(read > 0, 1 + count / LISTED),
        })
    }

    pub(super) fn said(&self) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let Self {
            shards,
            sized,
            samples,
            ..
        } = self;
        format!(
            "{shards} shards of {:.3} GB (by the sizes of {sized}), about {samples} samples; about {:.3} GB of latents; S3 requests of one \
             process without retries: {} GET, {} PUT and POST, {} LIST",
            gb(self.input_bytes),
            gb(self.output_bytes),
            self.reads,
            self.writes,
            self.lists
        )
    }
}

/// What a sample takes in an output shard. Bytes.
fn output_sample(latents: &Latents, seen: &Seen<'_>) -> u64 {
    let member = |content: u64| BLOCK + content.div_ceil(BLOCK) * BLOCK;
    let halves = |shape: &[usize]| 2 * shape.iter().product::<usize>() as u64;
    let json = seen
        .sample
        .json
        .as_ref()
        .map_or(0, |json| json.to_string().len());
    let embeds = match latents.text {
        TextKind::Caption => 0,
        TextKind::Embeds | TextKind::Both => member(NPY_HEADER + halves(&seen.prompt_embeds)),
    };
    member(NPY_HEADER + latents.crops as u64 * halves(&seen.latent))
        + embeds
        + member(seen.sample.caption.len() as u64)
        + member(json as u64 + NOTES)
}
