//! The manifest: the common properties of all latents of a folder, and an entry for each shard.

use std::collections::BTreeMap;
use std::fmt;

use coffey_pipeline::destination::Destination;
use coffey_pipeline::{CropMode, Filter, Interpolation, ListedShard};
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Fingerprint, LatentError};
use crate::config::{Config, FloatType, TextKind};

/// Version of the format. Other versions are not read.
pub const FORMAT_VERSION: u32 = 1;

/// Reasons to skip a sample after it was counted towards `max_samples`.
const DRAWN_REASONS: [&str; 3] = ["decode_error", "too_large", "duplicate_key"];
/// What the reason begins with for an image of a format that is not read. Counted as those.
const UNREAD_FORMAT: &str = "format:";
const SHA256_DIGITS: usize = 64;
/// Size of a header in a tar. Bytes.
const TAR_BLOCK: u64 = 512;

/// A manifest file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The common properties of all shards.
    #[serde(flatten)]
    pub recipe: Recipe,
    /// The finished shards, by file name.
    #[serde(deserialize_with = "read_shards")]
    pub shards: BTreeMap<String, ShardEntry>,
}

/// All settings that determine the content of a latent shard for a given input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The weights of the encoders.
    pub fingerprint: Fingerprint,
    /// Layout of `KEY.latent.npy`.
    pub latent: LatentLayout,
    /// Shape of `KEY.prompt_embeds.npy`, `[77, width]`; `null` when there are none.
    pub prompt_embeds_shape: Option<[usize; 2]>,
    /// Shape of `KEY.pooled.npy`, `[P]`, of SDXL; absent when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pooled_shape: Option<[usize; 1]>,
    /// Stored form of the captions.
    pub text: TextKind,
    /// Types the encoders ran in; absent if all are f32.
    #[serde(default, skip_serializing_if = "EncodedIn::is_exact")]
    pub encoded_in: EncodedIn,
    /// The image transform.
    pub image: ImageRecipe,
    /// The selection of samples.
    pub selection: Selection,
}

/// Types the encoders ran in, as `encode.vae_dtype` and `encode.dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodedIn {
    /// That of the autoencoder.
    pub vae: FloatType,
    /// That of the text encoders; f32 if captions are stored in place of embeddings.
    pub text_encoder: FloatType,
}

impl Default for EncodedIn {
    fn default() -> Self {
        Self {
            vae: FloatType::F32,
            text_encoder: FloatType::F32,
        }
    }
}

impl EncodedIn {
    fn is_exact(&self) -> bool {
        *self == Self::default()
    }
}

/// Shapes of a caption's embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextShapes {
    /// Hidden states, `[T, width]`.
    pub prompt_embeds: [usize; 2],
    /// Pooled embedding, `[P]`, of SDXL.
    pub pooled: Option<[usize; 1]>,
}

/// Shape and scale of the latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatentLayout {
    /// Shape of one crop's moments, `[2C, h, w]`: mean, then log-variance.
    pub shape: [usize; 3],
    /// Factor of a latent drawn from the moments, for the UNet. Not applied to the stored moments.
    pub scaling_factor: f64,
}

/// The image transform, as in the configuration's `[image]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecipe {
    /// Side of the square. Pixels.
    pub resolution: u32,
    /// Resampling filter.
    pub interpolation: Interpolation,
    /// Position of the crops.
    pub crop: CropMode,
    /// Crops of each sample.
    pub crops: usize,
    /// Whether half of the crops are mirrored.
    pub flip: bool,
    /// Whether large JPEGs were decoded at a fraction of their size.
    pub scaled_decode: bool,
    /// Seed of random crops and flips; absent without randomness.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The selection of samples, as in the configuration's `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// Extensions of images, in order of preference.
    pub image_keys: Vec<String>,
    /// Extensions of captions, in order of preference.
    pub caption_keys: Vec<String>,
    /// Most samples over all shards; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// Number of processes that share `max_samples`, which determines the samples; absent without `max_samples`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub world: Option<usize>,
    /// Limits on a sample's json and caption.
    pub filter: Filter,
}

/// The entry of one finished shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// URL of the input, without the query of a signed URL.
    pub source: String,
    /// Samples in the output.
    pub samples: u64,
    /// Samples of the input that are not in the output, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Fault of the input's tar; `null` without a fault.
    pub broken: Option<String>,
    /// Size of the output.
    pub bytes: u64,
    /// SHA-256 of the output, hexadecimal.
    pub sha256: String,
}

impl ShardEntry {
    /// Number of samples that count towards `max_samples`: also samples that failed to decode.
    pub(super) fn counted(&self) -> u64 {
        let is_drawn =
            |reason: &str| DRAWN_REASONS.contains(&reason) || reason.starts_with(UNREAD_FORMAT);
        let skipped = self.skipped.iter();
        let drawn = skipped.filter(|(reason, _)| is_drawn(reason));
        drawn
            .map(|(_, count)| *count)
            .fold(self.samples, u64::saturating_add)
    }

    /// Fault of the entry of the shard `name`, if it has one.
    fn fault(&self, name: &str) -> Option<String> {
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Some("is no file name: shards are in the folder of the manifest".to_owned());
        }
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if self.sha256.len() != SHA256_DIGITS || !self.sha256.bytes().all(is_hex) {
            let found = &self.sha256;
            return Some(format!(
                "has the sha256 {found:?}, which is not {SHA256_DIGITS} hexadecimal digits"
            ));
        }
        if self.samples > self.bytes / TAR_BLOCK {
            let Self { samples, bytes, .. } = self;
            return Some(format!(
                "has {samples} samples in {bytes} bytes, fewer than their tar headers take"
            ));
        }
        None
    }
}

impl From<&ShardEntry> for ListedShard {
    fn from(entry: &ShardEntry) -> Self {
        Self {
            bytes: entry.bytes,
            sha256: entry.sha256.clone(),
            samples: entry.samples,
        }
    }
}

/// Reads the entries of the shards. Refuses a name that is there twice, of which JSON readers keep the last.
fn read_shards<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, ShardEntry>, D::Error> {
    struct Shards;

    impl<'de> Visitor<'de> for Shards {
        type Value = BTreeMap<String, ShardEntry>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("shards by file name")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut shards = BTreeMap::new();
            while let Some((name, entry)) = map.next_entry::<String, ShardEntry>()? {
                if let Some(fault) = entry.fault(&name) {
                    return Err(Error::custom(format!("shard {name:?} {fault}")));
                }
                if shards.contains_key(&name) {
                    return Err(Error::custom(format!("shard {name:?} is listed twice")));
                }
                shards.insert(name, entry);
            }
            Ok(shards)
        }
    }

    deserializer.deserialize_map(Shards)
}

impl Recipe {
    /// The recipe of a configuration and the properties of the encoders.
    pub fn new(
        config: &Config,
        text: TextKind,
        crops: usize,
        fingerprint: Fingerprint,
        latent: LatentLayout,
        shapes: TextShapes,
        world: usize,
    ) -> Self {
        let Config { data, image, .. } = config;
        let random = image.crop == CropMode::Random || image.flip;
        let stored = text != TextKind::Caption;
        Self {
            fingerprint,
            latent,
            prompt_embeds_shape: stored.then_some(shapes.prompt_embeds),
            pooled_shape: shapes.pooled.filter(|_| stored),
            text,
            encoded_in: EncodedIn {
                vae: config.encode.vae_dtype,
                text_encoder: match text {
                    TextKind::Caption => FloatType::F32,
                    _ => config.encode.dtype,
                },
            },
            image: ImageRecipe {
                resolution: image.resolution,
                interpolation: image.interpolation,
                crop: image.crop,
                crops,
                flip: image.flip,
                scaled_decode: image.scaled_decode,
                seed: random.then_some(config.train.seed),
            },
            selection: Selection {
                image_keys: data.image_keys.clone(),
                caption_keys: data.caption_keys.clone(),
                max_samples: data.max_samples,
                world: data.max_samples.map(|_| world),
                filter: data.filter.clone().unwrap_or_default(),
            },
        }
    }
}

impl Recipe {
    /// Shape of `KEY.latent.npy`: `[2C, h, w]`, or `[crops, 2C, h, w]` with several crops.
    pub fn latent_file_shape(&self) -> Vec<usize> {
        let crops = (self.image.crops > 1).then_some(self.image.crops);
        crops.into_iter().chain(self.latent.shape).collect()
    }
}

impl Manifest {
    /// A manifest without shards.
    pub fn new(recipe: Recipe) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            recipe,
            shards: BTreeMap::new(),
        }
    }

    /// Number of samples in all shards.
    pub fn samples(&self) -> u64 {
        let samples = self.shards.values().map(|entry| entry.samples);
        samples.fold(0, u64::saturating_add)
    }

    /// Parses a manifest. The error describes the fault.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        /// The field of every version.
        #[derive(Deserialize)]
        struct Version {
            format_version: Option<u64>,
        }
        let invalid = |error: serde_json::Error| error.to_string();
        let Version { format_version } = serde_json::from_slice(text).map_err(invalid)?;
        match format_version {
            Some(version) if version == u64::from(FORMAT_VERSION) => {}
            Some(version) => {
                return Err(format!("format_version {version}, needed {FORMAT_VERSION}"));
            }
            None => return Err("format_version is missing".to_owned()),
        }
        serde_json::from_slice(text).map_err(invalid)
    }

    /// Replaces the manifest called `name`.
    pub(super) fn write(&self, place: &Destination, name: &str) -> Result<(), LatentError> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|error| place.failed(name, error.into()))?;
        text.push(b'\n');
        place.write(name, &text)?;
        Ok(())
    }

    /// Refuses another recipe than the manifest's. The error names the first value that differs, and `place` as the
    /// manifest.
    pub(super) fn check(&self, place: &str, now: &Recipe) -> Result<(), LatentError> {
        let as_json = |recipe: &Recipe| {
            serde_json::to_value(recipe).map_err(|error| LatentError::Manifest {
                manifest: place.to_owned(),
                message: error.to_string(),
            })
        };
        let (written, now) = (as_json(&self.recipe)?, as_json(now)?);
        match difference("", Some(&written), Some(&now)) {
            None => Ok(()),
            Some((field, written, now)) => Err(LatentError::OtherRecipe {
                manifest: place.to_owned(),
                field,
                written,
                now,
            }),
        }
    }
}

/// The first key at which two values differ, with both values. `place` is the key of `a` and `b`.
pub(super) fn difference(
    place: &str,
    a: Option<&Value>,
    b: Option<&Value>,
) -> Option<(String, String, String)> {
    if a == b {
        return None;
    }
    if let (Some(Value::Object(a)), Some(Value::Object(b))) = (a, b) {
        return a.keys().chain(b.keys()).find_map(|key| {
            let dot = if place.is_empty() { "" } else { "." };
            difference(&format!("{place}{dot}{key}"), a.get(key), b.get(key))
        });
    }
    let shown = |value: Option<&Value>| value.map_or("unset".to_owned(), Value::to_string);
    Some((place.to_owned(), shown(a), shown(b)))
}
