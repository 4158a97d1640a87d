//! `[data]`: which shards are streamed, and how samples are read and ordered.

use std::fmt;
use std::path::PathBuf;

use coffey_pipeline::{Filter, HttpHeader, ShardPattern, StreamConfig};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::ConfigError;
use super::bounds::{Bounds, integer, real};
use super::limits::Limits;

/// Bounds of the numbers in `[data]` and `[data.filter]`.
pub(super) const NUMBERS: &[Bounds] = &[
    integer("data.max_samples", 1, 1_000_000_000_000),
    integer("data.shuffle_buffer", 1, 10_000_000),
    integer("data.shuffle_buffer_mb", 1, 1_000_000),
    integer("data.open_shards", 1, 1024),
    integer("data.lanes", 1, 4096),
    integer("data.decode_threads", 1, 1024),
    integer("data.prefetch_batches", 1, 1024),
    integer("data.cache_limit_gb", 1, 1_000_000),
    real("data.max_bad_fraction", 0.0, 1.0),
    integer("data.filter.min_size", 0, 1_000_000),
    real("data.filter.max_pwatermark", 0.0, 1.0),
    real("data.filter.max_punsafe", 0.0, 1.0),
    real("data.filter.min_similarity", -1.0, 1.0),
    real("data.filter.min_aesthetic", -1000.0, 1000.0),
    integer("data.filter.min_caption_chars", 0, 1_000_000),
    integer("data.filter.max_caption_chars", 0, 1_000_000),
];

/// `[data]`. The defaults that the stream has as well are taken from [`StreamConfig::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Data {
    /// Shard URLs before expansion: `s3://`, `http(s)://`, `hf://`, file paths, `-`, braces, prefixes ending in `/`, `@list.txt`,
    /// and the reference's `pipe:aws s3 cp … -`. A string is a list of one. Required. `--train_shards_path_or_url`
    #[serde(deserialize_with = "one_or_many")]
    pub shards: Vec<ShardPattern>,
    /// Look up before the run whether every shard is there. No flag.
    pub check_shards: bool,
    /// Headers of requests for `http(s)://` shards, each `https://HOST NAME: VALUE` with `${VARIABLE}` in the value. No flag.
    pub http_headers: Vec<String>,
    /// What the shards hold. No flag.
    pub kind: DataKind,
    /// Source of the text embeddings, for latents only; [`TextFrom::Embeds`] when unset. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_from: Option<TextFrom>,
    /// The sizes that SDXL is told of each image. `--use_fix_crop_and_size`
    pub micro_conditioning: MicroConditioning,
    /// Extensions of the image in a sample, in order of preference. Fixed in the reference.
    pub image_keys: Vec<String>,
    /// Extensions of the caption in a sample, in order of preference. Fixed in the reference.
    pub caption_keys: Vec<String>,
    /// Samples of an epoch; all when unset. `--max_train_samples`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// Draw shards with replacement, as `wds.ResampledShards`; false: every sample once an epoch. Always true in
    /// the reference.
    pub resample_shards: bool,
    /// Samples in the shuffle buffer. Fixed at 1000 in the reference.
    pub shuffle_buffer: usize,
    /// Most megabytes (10⁶ bytes) of compressed samples in the shuffle buffer. No flag.
    pub shuffle_buffer_mb: u64,
    /// Shards read at once. No flag.
    pub open_shards: usize,
    /// Independent lanes of the stream, which ranks share: a power of two that divides `train.gradient_accumulation`; when unset, see
    /// [`Config::lanes`](super::Config::lanes). No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lanes: Option<usize>,
    /// Threads that decode and resize; the machine's cores by default. `--dataloader_num_workers`
    pub decode_threads: usize,
    /// Batches of pixels made ahead. No flag.
    pub prefetch_batches: usize,
    /// Folder in which remote shards are kept between epochs. No flag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// Most that `cache_dir` may hold, in units of 10⁹ bytes. No flag.
    pub cache_limit_gb: u64,
    /// Share of broken samples, 0 to 1, above which the run ends with an error. No flag.
    pub max_bad_fraction: f64,
    /// `[data.filter]`: limits on a sample's json and caption; unset: every sample passes. `WebdatasetFilter`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
}

impl Default for Data {
    fn default() -> Self {
        let stream = StreamConfig::default();
        Self {
            shards: Vec::new(),
            check_shards: true,
            http_headers: Vec::new(),
            kind: DataKind::Images,
            text_from: None,
            micro_conditioning: MicroConditioning::Image,
            image_keys: stream.image_keys,
            caption_keys: stream.caption_keys,
            max_samples: stream.max_samples,
            resample_shards: stream.resample,
            shuffle_buffer: stream.shuffle_buffer,
            shuffle_buffer_mb: stream.shuffle_buffer_mb,
            open_shards: stream.open_shards,
            lanes: None,
            decode_threads: stream.decode_threads,
            prefetch_batches: stream.prefetch_batches,
            cache_dir: None,
            cache_limit_gb: 500,
            max_bad_fraction: stream.max_bad_fraction,
            filter: None,
        }
    }
}

impl Data {
    /// Source of the text embeddings if the shards hold latents; `None` for images.
    #[must_use]
    pub fn latents(&self) -> Option<TextFrom> {
        match self.kind {
            DataKind::Images => None,
            DataKind::Latents => Some(self.text_from.unwrap_or(TextFrom::Embeds)),
        }
    }

    /// The shards for a message, without secrets.
    #[must_use]
    pub fn shown_shards(&self) -> String {
        shown(&self.shards).join(", ")
    }

    pub(super) fn check(&self, limits: &Limits<'_>) -> Result<(), ConfigError> {
        limits.written("data.shards")?;
        limits.words("data.shards", &shown(&self.shards))?;
        for header in &self.http_headers {
            if let Err(fault) = header.parse::<HttpHeader>() {
                let needs = format!("{} {fault}", without_value(header));
                limits.check("data.http_headers", "", false, &needs)?;
            }
        }
        limits.words("data.image_keys", &self.image_keys)?;
        limits.words("data.caption_keys", &self.caption_keys)?;
        match (self.kind, self.text_from) {
            (DataKind::Images, Some(from)) => {
                let needs = "has no effect with data.kind = \"images\", whose captions are encoded; remove it";
                limits.check("data.text_from", from.quoted(), false, needs)?;
            }
            (DataKind::Images, None) => {}
            (DataKind::Latents, _) => {
                let default = Self::default();
                for (key, keys, default) in [
                    ("data.image_keys", &self.image_keys, default.image_keys),
                    (
                        "data.caption_keys",
                        &self.caption_keys,
                        default.caption_keys,
                    ),
                ] {
                    let needs = "has no effect with data.kind = \"latents\", whose members have fixed names; remove it";
                    limits.check(key, format!("{keys:?}"), *keys == default, needs)?;
                }
            }
        }
        limits.path("data.cache_dir", self.cache_dir.as_deref())?;
        match &self.filter {
            Some(filter) => check_filter(filter, limits),
            None => Ok(()),
        }
    }
}

fn shown(shards: &[ShardPattern]) -> Vec<String> {
    shards.iter().map(ToString::to_string).collect()
}

/// A header for a message: its value may be a secret.
fn without_value(header: &str) -> String {
    match header.split_once(char::is_whitespace) {
        Some((server, field)) if server.contains("://") && !server.contains('@') => {
            let name = field.split_once(':').map_or("", |(name, _)| name);
            format!("\"{server} {name}: …\"")
        }
        _ => "\"…\"".to_owned(),
    }
}

/// What the shards hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Captioned images.
    Images,
    /// Latents, as `precompute` writes them.
    Latents,
}

/// The sizes that SDXL is told of each image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MicroConditioning {
    /// The size and the crop that the image has.
    Image,
    /// The size of the crop and no crop, whatever the image has.
    Fixed,
}

/// Source of the text embeddings when latents are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextFrom {
    /// From the shards.
    Embeds,
    /// From the captions in the shards, through the text encoder.
    Caption,
}

impl TextFrom {
    /// The word as TOML.
    fn quoted(self) -> &'static str {
        match self {
            Self::Embeds => "\"embeds\"",
            Self::Caption => "\"caption\"",
        }
    }
}

fn check_filter(filter: &Filter, limits: &Limits<'_>) -> Result<(), ConfigError> {
    if let (Some(min), Some(max)) = (filter.min_caption_chars, filter.max_caption_chars) {
        let needs = format!("must not be above data.filter.max_caption_chars = {max}");
        limits.check("data.filter.min_caption_chars", min, min <= max, &needs)?;
    }
    Ok(())
}

/// Reads a string as a list of one.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ShardPattern>, D::Error> {
    struct OneOrMany;

    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<ShardPattern>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }

        fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
            Ok(vec![text.into()])
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
