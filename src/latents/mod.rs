//! Latent shards: what `coffey precompute` leaves behind, so that later runs need neither VAE nor text encoder.
//!
//! This module owns the format, its manifest and the fingerprint of the weights it was made with. It never encodes
//! and never decides which samples there are: it writes what comes out of the [encode pool](crate::encode), and says what a
//! run that trains on latents must know of them ([`LatentSource`]).
//!
//! # A shard
//! A folder, or a prefix in S3, holds one tar for each input shard: same file name, same sample keys, same order of samples. Its members,
//! in this order, for each sample:
//!
//! | member | content |
//! | --- | --- |
//! | `KEY.latent.npy` | `<f2` (f16) `[2C, h, w]` in C order, `[crops, 2C, h, w]` with several crops: the VAE's moments, `C` channels of mean, then `C` of log-variance, neither clamped nor scaled |
//! | `KEY.prompt_embeds.npy` | `<f2` (f16) `[77, width]`: the text encoder's `last_hidden_state`; only with `text = "embeds"` or `"both"` |
//! | `KEY.txt` | the caption, UTF-8, as the input has it |
//! | `KEY.json` | the input's json with one more key, `coffey` |
//!
//! `coffey` in the json says which part of the image the latents are of. Sizes are in pixels:
//!
//! ```json
//! {"caption": "doughnut", "coffey": {"original_width": 64, "original_height": 64, "resized_width": 64,
//!  "resized_height": 64, "crop_top": 0, "crop_left": 0, "flipped": false, "target_width": 64,
//!  "target_height": 64}}
//! ```
//!
//! The scale is `resized / original`; `crop_top` and `crop_left` count in the resized image. An input json that is not
//! an object stands under the key `json`, beside `coffey`.
//!
//! Headers say nothing of where and when a shard was written (mtime, uid and gid 0, mode 0644), so the same input makes
//! the same bytes. A shard is there whole or not there ([`coffey_pipeline::destination`]). An input shard of which no sample can be used has a tar without members.
//!
//! # The manifest
//! `manifest.json` says what all latents of the place have in common ([`Recipe`]) and, by file name, what became of each
//! shard ([`ShardEntry`]). It is replaced whole after every shard. Where several processes share the shards each keeps its
//! own, `manifest-RANK-of-WORLD.json`, until [`join`] makes one of them. A run that finds manifests skips the shards they
//! list whose object has the listed size (contents are not read again), and refuses to write latents of another recipe
//! beside them. `skipped/NAME.jsonl` lists the samples that a shard leaves out.

/// Extension of the caption.
pub const CAPTION_KEY: &str = "txt";

mod error;
mod fingerprint;
mod manifest;
mod parts;
mod sample;
mod shard;
mod skipped;
mod source;
#[cfg(test)]
mod tests;
mod writer;

pub use error::LatentError;
pub use fingerprint::Fingerprint;
pub use manifest::{
    FORMAT_VERSION, ImageRecipe, LatentLayout, Manifest, Recipe, Selection, ShardEntry,
};
pub use parts::{Joined, join};
pub use source::{LatentSource, LatentSourceError, manifests};
pub use writer::LatentWriter;
