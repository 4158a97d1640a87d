//! Latents: arrays of latent shards, one of a sample's crops drawn each time.

use bytes::Bytes;
use half::f16;

use super::{DecodeFailure, SampleKind, absent, append};
use crate::format::latents::{LATENT, LatentShapes, POOLED, PROMPT_EMBEDS, geometry_of_crop};
use crate::format::{ArrayError, Npy};
use crate::image::CropGeometry;
use crate::json::Document;
use crate::order::rng::{Rng, index_below};
use crate::shard::Sample;
use crate::stream::data::{BatchData, F16Array};
use crate::stream::skip::SkipReason;

#[derive(Debug, Clone)]
pub(in crate::stream) struct Latents {
    shapes: LatentShapes,
}

/// The arrays of a sample, as npy files.
#[derive(Debug)]
pub(in crate::stream) struct LatentFiles {
    moments: Bytes,
    /// `None` if captions are read instead.
    prompt_embeds: Option<Bytes>,
    pooled: Option<Bytes>,
}

/// Values of a sample, or of the samples of a batch.
#[derive(Debug, Default, PartialEq)]
pub(in crate::stream) struct LatentValues {
    moments: Vec<f16>,
    /// Empty if captions are read instead.
    prompt_embeds: Vec<f16>,
    /// Empty if no pooled embeddings are read.
    pooled: Vec<f16>,
}

impl Latents {
    pub(in crate::stream) fn new(shapes: LatentShapes) -> Self {
        Self { shapes }
    }
}

fn member(sample: &Sample, key: &str, missing: SkipReason) -> Result<Bytes, SkipReason> {
    match sample.members.get(key) {
        Some(file) => Ok(file.clone()),
        None => Err(absent(sample, [key], missing)),
    }
}

impl SampleKind for Latents {
    type Encoded = LatentFiles;
    type Decoded = LatentValues;
    type Collected = LatentValues;
    type Output = BatchData;

    fn select(&self, sample: &Sample) -> Result<LatentFiles, SkipReason> {
        let moments = member(sample, LATENT, SkipReason::NO_LATENT)?;
        let embeds = |wanted: bool, key| {
            wanted
                .then(|| member(sample, key, SkipReason::NO_EMBEDS))
                .transpose()
        };
        Ok(LatentFiles {
            moments,
            prompt_embeds: embeds(self.shapes.prompt_embeds.is_some(), PROMPT_EMBEDS)?,
            pooled: embeds(self.shapes.pooled.is_some(), POOLED)?,
        })
    }

    fn needs_caption(&self) -> bool {
        self.shapes.prompt_embeds.is_none()
    }

    fn encoded_bytes(files: &LatentFiles) -> usize {
        let embeds = [&files.prompt_embeds, &files.pooled];
        let embeds = embeds.into_iter().flatten().map(Bytes::len);
        files.moments.len() + embeds.sum::<usize>()
    }

    fn decode(
        &mut self,
        files: &LatentFiles,
        json: Option<&Document>,
        rng: &mut Rng,
    ) -> Result<(LatentValues, CropGeometry), DecodeFailure> {
        let crops = Npy::open(&files.moments)?.arrays(&self.shapes.moments)?;
        let crop = match crops.count() {
            1 => 0,
            count => index_below(rng, count),
        };
        let moments = crops.get(crop)?;
        let prompt_embeds = match (&files.prompt_embeds, &self.shapes.prompt_embeds) {
            (Some(file), Some(shape)) => Npy::open(file)?.arrays(shape)?.only()?,
            _ => Vec::new(),
        };
        let pooled = match (&files.pooled, &self.shapes.pooled) {
            (Some(file), Some(shape)) => Npy::open(file)?.arrays(shape)?.only()?,
            _ => Vec::new(),
        };
        let values = LatentValues {
            moments,
            prompt_embeds,
            pooled,
        };
        let geometry = json.map_or_else(CropGeometry::default, |json| geometry_of_crop(json, crop));
        Ok((values, geometry))
    }

    fn decoded_bytes(values: &LatentValues) -> usize {
        let embeds = values.prompt_embeds.len() + values.pooled.len();
        size_of::<f16>() * (values.moments.len() + embeds)
    }

    fn push(batch: &mut LatentValues, sample: &LatentValues, batch_size: usize) {
        append(&mut batch.moments, &sample.moments, batch_size);
        append(&mut batch.prompt_embeds, &sample.prompt_embeds, batch_size);
        append(&mut batch.pooled, &sample.pooled, batch_size);
    }

    fn finish(&self, batch: LatentValues) -> BatchData {
        let prompt_embeds = self.shapes.prompt_embeds.map(|shape| F16Array {
            values: batch.prompt_embeds,
            shape,
        });
        BatchData::Latents {
            moments: F16Array {
                values: batch.moments,
                shape: self.shapes.moments,
            },
            prompt_embeds,
            pooled: self.shapes.pooled.map(|shape| F16Array {
                values: batch.pooled,
                shape,
            }),
        }
    }
}

impl From<ArrayError> for DecodeFailure {
    fn from(error: ArrayError) -> Self {
        Self {
            cause: error.to_string(),
            reason: match error {
                ArrayError::Damaged(_) => SkipReason::DECODE_ERROR,
                ArrayError::Other { .. } => SkipReason::OTHER_ARRAY,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::rng::rng;
    use npyz::{WriteOptions, WriterBuilder};

    fn npy(shape: &[u64], values: &[f16]) -> Bytes {
        let mut bytes = Vec::new();
        let options = WriteOptions::new().default_dtype().shape(shape);
        let mut writer = options.writer(&mut bytes).begin_nd().unwrap();
        writer.extend(values.iter().copied()).unwrap();
        writer.finish().unwrap();
        bytes.into()
    }

    fn halves(values: std::ops::Range<u16>) -> Vec<f16> {
        let half = |n: u16| f16::from_f32(f32::from(n) / 8.0);
        values.map(half).collect()
    }

    fn latents(prompt_embeds: Option<[usize; 2]>) -> Latents {
        Latents::new(LatentShapes {
            moments: [2, 1, 3],
            prompt_embeds,
            pooled: None,
        })
    }

    #[test]
    fn latents_draw_one_crop_with_its_geometry() {
        let files = LatentFiles {
            moments: npy(&[3, 2, 1, 3], &halves(0..18)),
            prompt_embeds: None,
            pooled: None,
        };
        let json = br#"{"coffey": {
            "original_width": 90, "original_height": 60, "resized_width": 96, "resized_height": 64,
            "crop_top": [0, 1, 2], "crop_left": [7, 8, 9], "flipped": [false, true, false]
        }}"#;
        let json = Document::parse(json).unwrap();
        let mut drawn = std::collections::BTreeSet::new();
        for occasion in 0..20 {
            let draw = || {
                let mut rng = rng(1, "crop", occasion, 5);
                latents(None).decode(&files, Some(&json), &mut rng).unwrap()
            };
            let (values, geometry) = draw();
            assert_eq!((&values, &geometry), (&draw().0, &draw().1));
            let crop = geometry.crops[0];
            let index = crop.top as u16;
            assert_eq!(values.moments, halves(6 * index..6 * (index + 1)));
            assert_eq!((geometry.original, geometry.resized), ((90, 60), (96, 64)));
            assert_eq!((crop.left, crop.flipped), (7 + crop.top, index == 1));
            drawn.insert(index);
        }
        assert_eq!(drawn.len(), 3);
    }

    #[test]
    fn latents_take_one_array_of_embeddings() {
        let decode = |shape: &[u64], count| {
            let files = LatentFiles {
                moments: npy(&[2, 1, 3], &halves(0..6)),
                prompt_embeds: Some(npy(shape, &halves(0..count))),
                pooled: None,
            };
            latents(Some([2, 2])).decode(&files, None, &mut rng(1, "crop", 0, 0))
        };
        let (values, geometry) = decode(&[2, 2], 4).unwrap();
        assert_eq!(geometry, CropGeometry::default());
        assert_eq!(values.prompt_embeds, halves(0..4));
        assert!(decode(&[2, 2, 2], 8).is_err());
    }
}
