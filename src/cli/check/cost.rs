//! Estimate of what a `precompute` run reads, writes and requests from S3.

use coffey_pipeline::destination::PartOptions;
use coffey_pipeline::{SampleMeta, ShardUrl, counted};
use serde::Serialize;

use crate::cli::Failure;
use crate::cli::resources::DataAccess;
use crate::config::{Config, Latents, TextKind, in_s3};
use crate::latents::TextShapes;

/// Shards whose sizes are requested, spread over the list; their mean is taken for all shards.
const SIZED: usize = 3;
/// Block size of a tar. Bytes.
const BLOCK: u64 = 512;
/// End mark of a tar. Bytes.
const TAR_END: u64 = 2 * BLOCK;
/// Header of an npy file. Bytes.
const NPY_HEADER: u64 = 128;
/// Notes added to a sample's json for one crop. Bytes.
const NOTES: u64 = 190;
/// Names in one response to a LIST request.
const LISTED: u64 = 1000;

/// The estimate, from a few shards' sizes and the first samples of the first shard. Field names are keys of `check --json`.
#[derive(Debug, Serialize)]
pub(super) struct Cost {
    shards: u64,
    /// Shards whose size was requested.
    sized: u64,
    input_bytes: u64,
    samples: u64,
    output_bytes: u64,
    /// GET requests, one for each shard in S3.
    reads: u64,
    /// PUT and POST requests: shards, in parts if they are large, and the manifest after each.
    writes: u64,
    /// LIST requests.
    lists: u64,
}

/// Measured sizes of the samples.
pub(super) struct SampleSizes<'a> {
    /// The first sample.
    pub(super) sample: &'a SampleMeta,
    /// Mean size of a sample's members. Bytes.
    pub(super) bytes: u64,
    /// Shape of the moments, `[2C, h, w]`.
    pub(super) latent: [usize; 3],
    /// Shapes of the text embeddings.
    pub(super) text: TextShapes,
}

impl Cost {
    /// Opens a few of `shards` for their sizes.
    pub(super) fn estimate(
        config: &Config,
        latents: &Latents,
        sizes: &SampleSizes<'_>,
        shards: &[ShardUrl],
        data: &DataAccess,
    ) -> Result<Self, Failure> {
        let step = shards.len().div_ceil(SIZED).max(1);
        let mut shard_sizes = Vec::new();
        for url in shards.iter().step_by(step) {
            shard_sizes.extend(data.runtime.block_on(data.sources.size(url))?);
        }
        let count = shards.len() as u64;
        let mean = shard_sizes.iter().sum::<u64>() / (shard_sizes.len() as u64).max(1);
        // Image, caption, and json if there is one.
        let members = 2 + u64::from(sizes.sample.json.is_some());
        let sample = sizes.bytes + members * (BLOCK + BLOCK / 2);
        let all = count * mean / sample.max(1);
        let samples = config.data.max_samples.map_or(all, |max| max.min(all));
        let output = samples * output_sample(latents, sizes) + count * TAR_END;
        let if_in_s3 = |in_s3: bool, requests: u64| if in_s3 { requests } else { 0 };
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
            sized: shard_sizes.len() as u64,
            input_bytes: count * mean,
            samples,
            output_bytes: output,
            reads: read,
            writes: if_in_s3(written, count * (shard + 1) + 2),
            lists: if_in_s3(written, 2 * (1 + count / LISTED))
                + if_in_s3(read > 0, 1 + count / LISTED),
        })
    }

    pub(super) fn message(&self) -> String {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let Self {
            shards,
            sized,
            samples,
            ..
        } = self;
        format!(
            "{} of {:.3} GB (by the sizes of {sized}), about {}; about {:.3} GB of latents; S3 requests of one \
             process without retries: {} GET, {} PUT and POST, {} LIST",
            counted(*shards, "shard"),
            gb(self.input_bytes),
            counted(*samples, "sample"),
            gb(self.output_bytes),
            self.reads,
            self.writes,
            self.lists
        )
    }
}

/// Size of a sample in an output shard. Bytes.
fn output_sample(latents: &Latents, sizes: &SampleSizes<'_>) -> u64 {
    let member = |content: u64| BLOCK + content.div_ceil(BLOCK) * BLOCK;
    let halves = |shape: &[usize]| 2 * shape.iter().product::<usize>() as u64;
    let json = sizes.sample.json.as_ref().map_or(0, |json| match json {
        Ok(document) => document.text().len(),
        Err(unreadable) => unreadable.quoted().len(),
    });
    let embeds = match latents.text {
        TextKind::Caption => 0,
        TextKind::Embeds | TextKind::Both => {
            let TextShapes {
                prompt_embeds,
                pooled,
            } = sizes.text;
            let pooled = pooled.map_or(0, |shape| member(NPY_HEADER + halves(&shape)));
            member(NPY_HEADER + halves(&prompt_embeds)) + pooled
        }
    };
    member(NPY_HEADER + latents.crops as u64 * halves(&sizes.latent))
        + embeds
        + member(sizes.sample.caption.len() as u64)
        + member(json as u64 + NOTES)
}
