//! Metadata of a sample in a batch.

use std::sync::Arc;

use crate::image::CropGeometry;
use crate::json::SampleJson;

/// Metadata of a sample in a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleMeta {
    /// Key in the shard.
    pub key: Arc<str>,
    /// Index of the shard ([`crate::Stream::shards`]).
    pub shard: usize,
    /// Number in the stream, from 0. Samples that fail to decode are counted too.
    pub position: u64,
    /// The epoch that the sample was read in, from 0.
    pub epoch: u64,
    /// The caption, as it is in the shard. Empty for latents with embeddings and without a caption.
    pub caption: String,
    /// The sample's json, if there is one: read, or as it is if it can't be read.
    pub json: Option<SampleJson>,
    /// Sizes of the image, and the windows of its crops. For latents: from their json, with the window of the drawn
    /// crop.
    pub geometry: CropGeometry,
}
