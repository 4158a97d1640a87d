//! Kinds of sample data: images, latents, captions only.
//!
//! The kind of a stream is fixed when the stream opens. The stages are generic over it, so that samples of two kinds
//! can't meet in one batch. A new kind is one file here, and one arm in [`crate::Stream::open`].

mod captions;
mod images;
mod latents;

use std::fmt::Debug;

use crate::image::CropGeometry;
use crate::json::Document;
use crate::order::rng::Rng;
use crate::shard::Sample;

use super::skip::SkipReason;

pub(super) use captions::CaptionsOnly;
pub(super) use images::Images;
pub(super) use latents::Latents;

/// One kind of sample data: its members in a shard, how a sample is decoded and how samples form a batch.
///
/// A value holds the settings of the kind, and the work space of one decode thread.
pub(super) trait SampleKind: Clone + Debug + Send + 'static {
    /// Members of one sample, as they are in the shard.
    type Encoded: Debug + Send;
    /// Decoded data of one sample.
    type Decoded: Debug + Send;
    /// Decoded data of the samples of a batch that is being collected. The default holds no samples.
    type Collected: Debug + Default + Send;
    /// Data of a complete batch.
    type Output: Debug + Send + 'static;

    /// The members of `sample` that are decoded.
    fn select(&self, sample: &Sample) -> Result<Self::Encoded, SkipReason>;

    /// Whether a sample without a caption is skipped.
    fn needs_caption(&self) -> bool;

    /// Size of the members. Bytes.
    fn encoded_bytes(encoded: &Self::Encoded) -> usize;

    /// Decodes a sample. `json` is the sample's, `rng` draws its crops.
    fn decode(
        &mut self,
        encoded: &Self::Encoded,
        json: Option<&Document>,
        rng: &mut Rng,
    ) -> Result<(Self::Decoded, CropGeometry), DecodeFailure>;

    /// Size of the decoded data. Bytes.
    fn decoded_bytes(decoded: &Self::Decoded) -> usize;

    /// Adds a sample to a batch that will hold `batch_size` samples.
    fn push(batch: &mut Self::Collected, sample: &Self::Decoded, batch_size: usize);

    /// The data of a complete batch.
    fn finish(&self, batch: Self::Collected) -> Self::Output;
}

/// Why a sample could not be decoded.
#[derive(Debug)]
pub(super) struct DecodeFailure {
    /// For the counts.
    pub(super) reason: SkipReason,
    /// For the log.
    pub(super) cause: String,
}

/// Appends a sample's values. The first sample reserves the memory of `batch_size` samples.
fn append<T: Copy>(batch: &mut Vec<T>, sample: &[T], batch_size: usize) {
    if batch.is_empty() {
        batch.reserve_exact(batch_size * sample.len());
    }
    batch.extend_from_slice(sample);
}

/// The reason to skip a sample that has none of the members `keys`: [`SkipReason::TOO_LARGE`] if one was left out for
/// its size, else `missing`.
fn absent<'a>(
    sample: &Sample,
    keys: impl IntoIterator<Item = &'a str>,
    missing: SkipReason,
) -> SkipReason {
    let oversized = keys
        .into_iter()
        .any(|key| sample.oversized.contains_key(key));
    if oversized {
        SkipReason::TOO_LARGE
    } else {
        missing
    }
}
