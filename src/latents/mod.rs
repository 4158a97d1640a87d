//! Latent shards: what `coffey precompute` leaves behind, so that later runs need neither VAE nor text encoder.
//!
//! This module owns the format, its manifest and the fingerprint of the weights it was made with. It never encodes
//! and never decides which samples there are: it writes what comes out of the [encode pool](crate::encode), and says what a
//! run that trains on latents must know of them ([`LatentSource`]).
//!
//! # A shard
//! A folder holds one tar for each input shard: same file name, same sample keys, same order of samples. Its members,
//! in this order, for each sample:
//!
//! | member | content |
//! | --- | --- |
//! | `KEY.latent.npy` | `<f2` (f16) `[2C, h, w]` in C order: the VAE's moments, `C` channels of mean, then `C` of log-variance, neither clamped nor scaled |
//! | `KEY.prompt_embeds.npy` | `<f2` (f16) `[77, width]`: the text encoder's `last_hidden_state`; only with `text = "embeds"` or `"both"` |
//! | `KEY.txt` | the caption, UTF-8, as the input has it |
//! | `KEY.json` | the input's json with one more key, `coffey` |
//!
//! `coffey` in the json says which part of the image the latents are of. Sizes are in pixels:
//!
//! ```json
//! {"caption": "doughnut", "coffey": {"original_width": 64, "original_height": 64, "resized_width": 64,
//!  "resized_height": 64, "crop_top": 0, "crop_left": 0, "flipped": false, "resolution": 64}}
//! ```
//!
//! The scale is `resized / original`; `crop_top` and `crop_left` count in the resized image. An input json that is not
//! an object stands under the key `json`, beside `coffey`.
//!
//! Headers say nothing of where and when a shard was written (mtime, uid and gid 0, mode 0644), so the same input makes
//! the same bytes. A shard is written aside as `.NAME.tmp` and renamed once it is on the disk: it is there whole or not
//! there. An input shard of which no sample can be used has a tar without members.
//!
//! # The manifest
//! `manifest.json`, or `manifest-RANK-of-WORLD.json` where several processes share the shards, says what all latents of
//! the folder have in common ([`Recipe`]) and, by file name, what became of each shard ([`ShardEntry`]). It is replaced
//! whole after every shard. A run that finds manifests skips the shards they list whose file has the listed size
//! (contents are not read again), and refuses to write latents of another recipe beside them.

/// Extension of the caption.
pub const CAPTION_KEY: &str = "txt";

mod aside;
mod error;
mod fingerprint;
mod manifest;
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
pub use source::{LatentSource, LatentSourceError};
pub use writer::{LatentWriter, Part};
