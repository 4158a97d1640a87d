//! Images: decoded, resized and cropped to pixels.

use bytes::Bytes;

use super::{DecodeFailure, SampleKind, absent, append};
use crate::image::{CropGeometry, Crops, DecodeError, ImageOptions, ImageTransform};
use crate::json::Document;
use crate::order::rng::Rng;
use crate::shard::Sample;
use crate::stream::config::StreamConfig;
use crate::stream::data::BatchData;
use crate::stream::skip::SkipReason;

#[derive(Debug, Clone)]
pub(in crate::stream) struct Images {
    keys: Vec<String>,
    options: ImageOptions,
    transform: ImageTransform,
}

impl Images {
    pub(in crate::stream) fn new(config: &StreamConfig) -> Self {
        Self {
            keys: config.image_keys.clone(),
            options: config.image,
            transform: ImageTransform::default(),
        }
    }
}

impl SampleKind for Images {
    type Encoded = Bytes;
    /// `[crops, 3, R, R]`, 8 bit.
    type Decoded = Vec<u8>;
    /// `[B, crops, 3, R, R]`, 8 bit.
    type Collected = Vec<u8>;
    type Output = BatchData;

    fn select(&self, sample: &Sample) -> Result<Bytes, SkipReason> {
        match sample.pick(&self.keys) {
            Some((_, image)) => Ok(image.clone()),
            None => {
                let keys = self.keys.iter().map(String::as_str);
                Err(absent(sample, keys, SkipReason::NO_IMAGE))
            }
        }
    }

    fn needs_caption(&self) -> bool {
        true
    }

    fn encoded_bytes(image: &Bytes) -> usize {
        image.len()
    }

    fn decode(
        &mut self,
        image: &Bytes,
        _json: Option<&Document>,
        rng: &mut Rng,
    ) -> Result<(Vec<u8>, CropGeometry), DecodeFailure> {
        let Crops { pixels, geometry } = self.transform.apply(image, &self.options, rng)?;
        Ok((pixels, geometry))
    }

    fn decoded_bytes(pixels: &Vec<u8>) -> usize {
        pixels.len()
    }

    fn push(batch: &mut Vec<u8>, pixels: &Vec<u8>, batch_size: usize) {
        append(batch, pixels, batch_size);
    }

    fn finish(&self, levels: Vec<u8>) -> BatchData {
        BatchData::Pixels {
            levels,
            resolution: self.options.resolution,
        }
    }
}

impl From<DecodeError> for DecodeFailure {
    fn from(error: DecodeError) -> Self {
        Self {
            cause: error.to_string(),
            reason: match error {
                DecodeError::TooLarge { .. } => SkipReason::TOO_LARGE,
                DecodeError::UnreadFormat(format) => SkipReason::UnreadFormat(format),
                DecodeError::UnknownFormat | DecodeError::Damaged(_) => SkipReason::DECODE_ERROR,
            },
        }
    }
}
