//! Streams of latent shards: the order, which is that of the images, and the samples that are skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::support::{Bench, bucket, config, keys, sequential, tar_of, urls};
use coffey_pipeline::{
    Batch, BatchData, Content, Cursor, LatentShapes, ShardUrl, StreamConfig, StreamError,
};
use half::f16;
use npyz::{WriteOptions, WriterBuilder};

const SHAPES: LatentShapes = LatentShapes {
    moments: [2, 1, 3],
    prompt_embeds: Some([2, 2]),
    pooled: None,
};
/// The count of numbers in a sample's moments.
const MOMENTS: usize = 6;

fn npy(shape: &[u64], value: f32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let options = WriteOptions::new().default_dtype().shape(shape);
    let mut writer = options.writer(&mut bytes).begin_nd().unwrap();
    let count = shape.iter().product::<u64>() as usize;
    writer
        .extend(std::iter::repeat_n(f16::from_f32(value), count))
        .unwrap();
    writer.finish().unwrap();
    bytes
}

/// The value in the arrays of sample `n` of shard `shard`.
fn mark(shard: u32, n: u32) -> f32 {
    (shard * 16 + n) as f32
}

/// A latent sample for [`crate::support::sample`]; each array is small and holds one value.
fn sample(shard: u32, n: u32) -> Vec<(String, Vec<u8>)> {
    let mut members = crate::support::sample(shard, n);
    let key = members[0].0.trim_end_matches(".png").to_owned();
    let mark = mark(shard, n);
    members.splice(
        ..1,
        [
            (format!("{key}.latent.npy"), npy(&[2, 1, 3], mark)),
            (format!("{key}.prompt_embeds.npy"), npy(&[2, 2], -mark)),
            (format!("{key}.pooled.npy"), npy(&[3], 0.5 + mark)),
        ],
    );
    members
}

fn write(root: &Path, shard: u32, members: &[(String, Vec<u8>)]) {
    let folder = root.join("latents");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{shard:05}.tar")), tar_of(members)).unwrap();
}

/// A bucket `latents` made of [`bucket`]'s shards.
fn latents(root: &Path, shards: u32, samples: impl Fn(u32) -> u32) -> Vec<ShardUrl> {
    for shard in 0..shards {
        let members: Vec<_> = (0..samples(shard)).flat_map(|n| sample(shard, n)).collect();
        write(root, shard, &members);
    }
    urls(&format!("s3://latents/{{00000..{:05}}}.tar", shards - 1))
}

fn reading(shapes: LatentShapes, config: StreamConfig) -> StreamConfig {
    StreamConfig {
        content: Content::Latents(shapes),
        caption_keys: vec!["txt".to_owned()],
        ..config
    }
}

/// The first number of each sample's moments.
fn marks(batch: &Batch) -> Vec<f32> {
    let BatchData::Latents { moments, .. } = &batch.data else {
        panic!("pixels where latents were read")
    };
    assert_eq!(moments.values.len(), batch.samples.len() * MOMENTS);
    let each = moments.values.chunks(MOMENTS);
    each.map(|values| values[0].to_f32()).collect()
}

#[test]
fn latent_order_equals_image_order() {
    let root = tempfile::tempdir().unwrap();
    let images = bucket(root.path(), 5, |n| 5 + n % 4);
    let latents = latents(root.path(), 5, |n| 5 + n % 4);
    let bench = Bench::embedded(root.path());
    for resample in [false, true] {
        let of = |shards: &[ShardUrl]| StreamConfig {
            resample,
            ..config(shards.to_vec())
        };
        let from_images = bench.batches(of(&images), 20).unwrap();
        let from_latents = bench.batches(reading(SHAPES, of(&latents)), 20).unwrap();
        assert_eq!(keys(&from_images), keys(&from_latents));
        for (a, b) in from_images.iter().zip(&from_latents) {
            assert_eq!(a.index, b.index);
            let captions = |batch: &Batch| {
                let samples = batch.samples.iter();
                let known = samples.map(|s| (s.position, s.epoch, s.caption.clone()));
                known.collect::<Vec<_>>()
            };
            assert_eq!(captions(a), captions(b));
        }
    }
}

#[test]
fn latent_arrays_stay_with_their_samples() {
    let root = tempfile::tempdir().unwrap();
    let shards = latents(root.path(), 3, |_| 5);
    let bench = Bench::embedded(root.path());
    let without = LatentShapes {
        prompt_embeds: None,
        ..SHAPES
    };
    let with_pooled = LatentShapes {
        pooled: Some([3]),
        ..SHAPES
    };
    for shapes in [SHAPES, without, with_pooled] {
        for batch in bench
            .batches(reading(shapes, config(shards.clone())), 9)
            .unwrap()
        {
            let expected: Vec<f32> = batch
                .samples
                .iter()
                .map(|sample| {
                    let number = |part: &str| part.parse::<u32>().unwrap();
                    let (shard, n) = sample.key.split_at(5);
                    assert_eq!(
                        sample.caption,
                        format!("picture {}", number(shard) * 100 + number(n))
                    );
                    mark(number(shard), number(n))
                })
                .collect();
            assert_eq!(marks(&batch), expected);
            let BatchData::Latents {
                moments,
                prompt_embeds,
                pooled,
            } = batch.data
            else {
                panic!("pixels")
            };
            assert_eq!(moments.shape, [2, 1, 3]);
            assert_eq!(prompt_embeds.is_some(), shapes.prompt_embeds.is_some());
            if let Some(embeds) = prompt_embeds {
                assert_eq!(embeds.shape, [2, 2]);
                let each = embeds.values.chunks(4).map(|values| -values[3].to_f32());
                assert_eq!(each.collect::<Vec<_>>(), expected);
            }
            assert_eq!(pooled.is_some(), shapes.pooled.is_some());
            if let Some(pooled) = pooled {
                assert_eq!(pooled.shape, [3]);
                let each = pooled.values.chunks(3).map(|v| v[2].to_f32() - 0.5);
                assert_eq!(each.collect::<Vec<_>>(), expected);
            }
        }
    }
}

#[test]
fn latent_stream_resumes_after_any_batch() {
    let root = tempfile::tempdir().unwrap();
    let shards = latents(root.path(), 4, |n| 5 + n % 3);
    let bench = Bench::embedded(root.path());
    let settings = |resume| {
        reading(
            SHAPES,
            StreamConfig {
                resume,
                ..config(shards.clone())
            },
        )
    };
    let whole = bench.batches(settings(None), 12).unwrap();
    for (n, batch) in whole.iter().enumerate().take(11) {
        let json = serde_json::to_string(&batch.cursor).unwrap();
        let cursor: Cursor = serde_json::from_str(&json).unwrap();
        let rest = bench.batches(settings(Some(cursor)), 11 - n).unwrap();
        assert_eq!(rest, whole[n + 1..], "from batch {n}");
    }
    // Another choice of arrays skips other samples, so the stream is another one.
    let captions = LatentShapes {
        prompt_embeds: None,
        ..SHAPES
    };
    let other = StreamConfig {
        content: Content::Latents(captions),
        ..settings(Some(whole[3].cursor.clone()))
    };
    assert!(matches!(bench.error(other), StreamError::Cursor(_)));
}

/// Streams one shard in which `change` is applied to every second sample; returns the count of skipped samples by reason.
fn skipped(
    shapes: LatentShapes,
    change: impl Fn(&mut Vec<(String, Vec<u8>)>),
) -> BTreeMap<String, u64> {
    let root = tempfile::tempdir().unwrap();
    let mut members = Vec::new();
    for n in 0..6 {
        let mut sample = sample(0, n);
        if n % 2 == 1 {
            change(&mut sample);
        }
        members.append(&mut sample);
    }
    write(root.path(), 0, &members);
    let bench = Bench::embedded(root.path());
    let settings = StreamConfig {
        max_bad_fraction: 1.0,
        batch_size: 1,
        ..sequential(urls("s3://latents/00000.tar"))
    };
    let batches = bench.all(reading(shapes, settings)).unwrap();
    let shard = &batches.last().unwrap().finished_shards[0];
    assert_eq!(shard.samples as usize, batches.len());
    shard.skipped.clone()
}

#[test]
fn unusable_latent_samples_are_skipped_with_reason() {
    let captions = LatentShapes {
        prompt_embeds: None,
        ..SHAPES
    };
    let without = |ending: &'static str| {
        move |sample: &mut Vec<(String, Vec<u8>)>| {
            sample.retain(|(name, _)| !name.ends_with(ending))
        }
    };
    let with = |index: usize, content: Vec<u8>| {
        move |sample: &mut Vec<(String, Vec<u8>)>| sample[index].1.clone_from(&content)
    };
    let all = |reason: &str| BTreeMap::from([(reason.to_owned(), 3)]);

    assert_eq!(skipped(SHAPES, without(".latent.npy")), all("no_latent"));
    assert_eq!(
        skipped(SHAPES, without(".prompt_embeds.npy")),
        all("no_embeds")
    );
    let pooled = LatentShapes {
        pooled: Some([3]),
        ..SHAPES
    };
    assert_eq!(skipped(pooled, without(".pooled.npy")), all("no_embeds"));
    assert_eq!(skipped(SHAPES, without(".pooled.npy")), BTreeMap::new());
    assert_eq!(skipped(pooled, with(2, npy(&[4], 0.5))), all("other_array"));
    assert_eq!(skipped(captions, without(".txt")), all("no_caption"));
    // With embeddings the caption is not needed; with captions the embeddings are not needed.
    assert_eq!(skipped(SHAPES, without(".txt")), BTreeMap::new());
    assert_eq!(
        skipped(captions, without(".prompt_embeds.npy")),
        BTreeMap::new()
    );
    let other = npy(&[2, 3, 1], 0.5);
    assert_eq!(skipped(SHAPES, with(0, other)), all("other_array"));
    let other = npy(&[77, 2], 0.5);
    assert_eq!(skipped(SHAPES, with(1, other.clone())), all("other_array"));
    assert_eq!(skipped(captions, with(1, other)), BTreeMap::new());
    let mut cut = npy(&[2, 1, 3], 0.5);
    cut.pop();
    assert_eq!(skipped(SHAPES, with(0, cut)), all("decode_error"));
    assert_eq!(
        skipped(SHAPES, with(0, npy(&[2, 1, 3], f32::NAN))),
        all("decode_error")
    );
}

#[test]
fn latent_crops_are_drawn_by_epoch_and_seed() {
    let root = tempfile::tempdir().unwrap();
    let mut members = Vec::new();
    for n in 0..8 {
        let mut sample = sample(0, n);
        // One array with four crops, of which crop i holds the value i.
        let mut crops = npy(&[4, 2, 1, 3], 0.0);
        let data = crops.len() - 4 * MOMENTS * 2;
        for (index, half) in crops[data..].chunks_exact_mut(2).enumerate() {
            half.copy_from_slice(&f16::from_f32((index / MOMENTS) as f32).to_le_bytes());
        }
        sample[0].1 = crops;
        sample[4].1 =
            br#"{"coffey": {"original_width": 64, "original_height": 48, "resized_width": 21,
            "resized_height": 16, "crop_top": [0, 1, 2, 3], "crop_left": [5, 6, 7, 8],
            "flipped": [false, true, false, true]}}"#
                .to_vec();
        members.append(&mut sample);
    }
    write(root.path(), 0, &members);
    let bench = Bench::embedded(root.path());
    let settings = |decode_threads| {
        let config = StreamConfig {
            decode_threads,
            ..config(urls("s3://latents/00000.tar"))
        };
        reading(SHAPES, config)
    };
    // 16 batches are eight epochs.
    let batches = bench.batches(settings(1), 16).unwrap();
    assert_eq!(batches, bench.batches(settings(3), 16).unwrap());
    let mut drawn: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for batch in &batches {
        for (sample, mark) in batch.samples.iter().zip(marks(batch)) {
            let crop = sample.geometry.crops[0];
            let index = crop.top;
            assert_eq!(mark, index as f32);
            assert_eq!((crop.left, crop.flipped), (5 + index, index % 2 == 1));
            assert_eq!(
                (sample.geometry.original, sample.geometry.resized),
                ((64, 48), (21, 16))
            );
            drawn
                .entry(sample.key.to_string())
                .or_default()
                .insert(index);
        }
    }
    assert_eq!(drawn.len(), 8);
    assert!(drawn.values().all(|indices| indices.len() > 1), "{drawn:?}");
}
