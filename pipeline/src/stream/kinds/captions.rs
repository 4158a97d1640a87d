//! Captions only: the samples of another kind, without their data.

use super::{DecodeFailure, SampleKind};
use crate::image::CropGeometry;
use crate::json::Document;
use crate::order::rng::Rng;
use crate::shard::Sample;
use crate::stream::skip::SkipReason;

/// Samples of the kind `K`, without their data. A sample must have `K`'s members; they are dropped and not decoded.
#[derive(Debug, Clone)]
pub(in crate::stream) struct CaptionsOnly<K>(pub(in crate::stream) K);

impl<K: SampleKind> SampleKind for CaptionsOnly<K> {
    /// Size of the members of `K`: the shuffle buffer then draws in the order of a stream of `K`. Bytes.
    type Encoded = usize;
    type Decoded = ();
    type Collected = ();
    type Output = ();

    fn select(&self, sample: &Sample) -> Result<usize, SkipReason> {
        let encoded = self.0.select(sample)?;
        Ok(K::encoded_bytes(&encoded))
    }

    fn needs_caption(&self) -> bool {
        self.0.needs_caption()
    }

    fn encoded_bytes(bytes: &usize) -> usize {
        *bytes
    }

    fn decode(
        &mut self,
        _bytes: &usize,
        _json: Option<&Document>,
        _rng: &mut Rng,
    ) -> Result<((), CropGeometry), DecodeFailure> {
        Ok(((), CropGeometry::default()))
    }

    fn decoded_bytes((): &()) -> usize {
        0
    }

    fn push((): &mut (), (): &(), _batch_size: usize) {}

    fn finish(&self, (): ()) {}
}
