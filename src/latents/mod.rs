//! Latent shards: written by `coffey precompute`, so that later runs need neither VAE nor text encoders.
//!
//! Owns the folder of latent shards: which shards are written by which process, the manifest, and the fingerprint of the
//! weights. The format of a sample is in [`coffey_pipeline::format::latents`]. The code here never encodes and never
//! selects samples: it writes the batches of the [encode pool](crate::encode), and tells a run that trains on latents
//! their properties ([`LatentSource`]).
//!
//! # Shards
//! A folder, or a prefix in S3, holds one tar for each input shard: same file name, same sample keys, same order of samples.
//!
//! Tar headers do not depend on time and user (mtime, uid and gid 0, mode 0644), so the same input gives
//! the same bytes. A shard is written whole or not at all ([`coffey_pipeline::destination`]). An input shard without usable
//! samples has a tar without members.
//!
//! # The manifest
//! `manifest.json` holds the common properties of all latents in the folder ([`Recipe`]) and, by file name, an entry for each
//! finished shard ([`ShardEntry`]). It is replaced as a whole after every shard. Where several processes share the shards, each
//! has its own, `manifest-RANK-of-WORLD.json`, until [`join`] merges them. A run skips the shards that a manifest lists
//! and whose object has the listed size, and refuses to write latents of another recipe
//! to the same folder. `skipped/NAME.jsonl` lists the skipped samples of a shard.

mod error;
mod fingerprint;
mod half;
mod manifest;
mod parts;
mod shard;
mod skipped;
mod source;
#[cfg(test)]
mod tests;
mod writer;

pub use error::LatentError;
pub use fingerprint::{Fingerprint, SecondText};
pub use manifest::{
    FORMAT_VERSION, ImageRecipe, LatentLayout, Manifest, Recipe, Selection, ShardEntry, TextShapes,
};
pub use parts::{Joined, join};
pub use source::{LatentSource, LatentSourceError, manifests};
pub use writer::LatentWriter;
