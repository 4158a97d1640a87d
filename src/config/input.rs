//! `[data]`, `[s3]` and `[image]`: what is streamed, from where, and how an image becomes a square.

use std::fmt;
use std::num::NonZero;
use std::path::PathBuf;
use std::thread::available_parallelism;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::values::{Crop, DataKind, Interpolation, TextFrom};

/// `[data]`: the shards and the way through them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Data {
    /// Shard URLs before expansion: `s3://`, `http(s)://`, file paths, `-`, braces, prefixes ending in `/`, `@list.txt`,
    /// and the reference's `pipe:aws s3 cp … -`. A string stands for a list of one. `--train_shards_path_or_url`
    #[serde(deserialize_with = "one_or_many")]
    pub shards: Vec<String>,
    /// What the shards hold. No flag.
    #[serde(default = "images")]
    pub kind: DataKind,
    /// Of latents: where the text embeddings come from; those in the shards by default. Unset for images. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_from: Option<TextFrom>,
    /// Extensions of the image in a sample, in order of preference. Fixed in the reference.
    #[serde(default = "image_keys")]
    pub image_keys: Vec<String>,
    /// Extensions of the caption in a sample, in order of preference. Fixed in the reference.
    #[serde(default = "caption_keys")]
    pub caption_keys: Vec<String>,
    /// Samples of an epoch; all when unset. `--max_train_samples`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// Draw shards with replacement, as `wds.ResampledShards`; false: every sample once an epoch. Always true in
    /// the reference.
    #[serde(default = "yes")]
    pub resample_shards: bool,
    /// Samples in the shuffle buffer. Fixed at 1000 in the reference.
    #[serde(default = "shuffle_buffer")]
    pub shuffle_buffer: usize,
    /// Most megabytes of compressed samples in it. No flag.
    #[serde(default = "shuffle_buffer_mb")]
    pub shuffle_buffer_mb: u64,
    /// Shards read at once. No flag.
    #[serde(default = "open_shards")]
    pub open_shards: usize,
    /// Threads that decode and resize; the machine's cores by default. `--dataloader_num_workers`
    #[serde(default = "cores")]
    pub decode_threads: usize,
    /// Batches of pixels made ahead. No flag.
    #[serde(default = "prefetch_batches")]
    pub prefetch_batches: usize,
    /// Folder in which remote shards are kept between epochs. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// Most that `cache_dir` may hold, in units of 10⁹ bytes. No flag.
    #[serde(default = "cache_limit_gb")]
    pub cache_limit_gb: u64,
    /// Share of broken samples, 0 to 1, above which the run ends with an error. No flag.
    #[serde(default = "max_bad_fraction")]
    pub max_bad_fraction: f64,
    /// Which samples are wanted, judged by their json; unset: all of them. `WebdatasetFilter`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
}

impl Data {
    /// Where the text embeddings come from if the shards hold latents; `None` for images.
    #[must_use]
    pub fn latents(&self) -> Option<TextFrom> {
        match self.kind {
            DataKind::Images => None,
            DataKind::Latents => Some(self.text_from.unwrap_or(TextFrom::Embeds)),
        }
    }
}

fn images() -> DataKind {
    DataKind::Images
}

pub(super) fn image_keys() -> Vec<String> {
    ["jpg", "png", "jpeg", "webp"].map(str::to_owned).to_vec()
}

pub(super) fn caption_keys() -> Vec<String> {
    ["text", "txt", "caption"].map(str::to_owned).to_vec()
}

fn yes() -> bool {
    true
}

fn shuffle_buffer() -> usize {
    1000
}

fn shuffle_buffer_mb() -> u64 {
    256
}

fn open_shards() -> usize {
    4
}

fn cores() -> usize {
    available_parallelism().map_or(1, NonZero::get)
}

fn prefetch_batches() -> usize {
    4
}

fn cache_limit_gb() -> u64 {
    500
}

fn max_bad_fraction() -> f64 {
    0.05
}

/// `[data.filter]`: limits on a sample's json and caption; an unset limit lets everything through.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    /// Least `original_width` and `original_height`, in pixels. `WebdatasetFilter(min_size)`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_size: Option<u32>,
    /// Greatest `pwatermark`, 0 to 1. `WebdatasetFilter(max_pwatermark)`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pwatermark: Option<f64>,
    /// Greatest `punsafe`, 0 to 1. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_punsafe: Option<f64>,
    /// Least `similarity` of image and caption, -1 to 1. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_similarity: Option<f64>,
    /// Least aesthetic score. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_aesthetic: Option<f64>,
    /// Shortest caption, in characters. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_caption_chars: Option<usize>,
    /// Longest caption, in characters. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_caption_chars: Option<usize>,
}

/// `[s3]`: how buckets are reached. What is unset is left to the AWS default chain. The reference leaves all of
/// this to the `aws` command line tool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct S3 {
    /// URL of an S3-compatible server; AWS when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_url: Option<String>,
    /// Region of the buckets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// `http://host/bucket/key` in place of `http://bucket.host/key`.
    pub path_style: bool,
    /// Unsigned requests, for public buckets.
    pub anonymous: bool,
    /// Pay for the transfer in requester-pays buckets.
    pub requester_pays: bool,
    /// PEM file of authorities to trust besides the system's; the file named by `AWS_CA_BUNDLE` when unset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_bundle: Option<PathBuf>,
    /// Tries of one object before the run ends with the cause.
    pub max_attempts: u32,
    /// Serve this folder's subfolders as buckets from a server inside this process, and read from that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedded_root: Option<PathBuf>,
}

impl Default for S3 {
    fn default() -> Self {
        Self {
            endpoint_url: None,
            region: None,
            path_style: false,
            anonymous: false,
            requester_pays: false,
            ca_bundle: None,
            max_attempts: 10,
            embedded_root: None,
        }
    }
}

/// `[image]`: from a picture of any shape to a square of pixels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Image {
    /// Side of the square, in pixels; the shorter side is resized to it. `--resolution`
    pub resolution: usize,
    /// Resampling filter. `--interpolation_type`
    pub interpolation: Interpolation,
    /// Which square is kept. `--center_crop`
    pub crop: Crop,
    /// Mirror every second image, drawn at random. `--random_flip`
    pub flip: bool,
    /// Decode JPEGs whose shorter side is twice the resolution or more at 1/2, 1/4 or 1/8. No flag.
    pub scaled_decode: bool,
}

impl Default for Image {
    fn default() -> Self {
        Self {
            resolution: 512,
            interpolation: Interpolation::Bilinear,
            crop: Crop::Random,
            flip: false,
            scaled_decode: true,
        }
    }
}

/// Reads a string as a list of one.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct OneOrMany;

    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }

        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = items.next_element()? {
                list.push(item);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_any(OneOrMany)
}
