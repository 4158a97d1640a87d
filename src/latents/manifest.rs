//! The manifest: what all latents of a folder have in common, and what became of each shard.

use std::collections::BTreeMap;

use coffey_pipeline::destination::Destination;
use coffey_pipeline::{CropMode, Filter, Interpolation};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Fingerprint, LatentError};
use crate::config::{Config, TextKind};

/// The version of the format that is written, and the only one that is read.
pub const FORMAT_VERSION: u32 = 1;

/// Reasons for which a sample is left out only after it was chosen.
const LEFT_OUT_WHEN_DECODED: [&str; 2] = ["decode_error", "too_large"];

/// A manifest file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] when it was written.
    pub format_version: u32,
    /// What all shards have in common.
    #[serde(flatten)]
    pub recipe: Recipe,
    /// What became of each shard that is finished, by its file name.
    pub shards: BTreeMap<String, ShardEntry>,
}

/// Everything that decides what a latent shard made of a given input holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The weights that encoded.
    pub fingerprint: Fingerprint,
    /// `KEY.latent.npy`
    pub latent: LatentLayout,
    /// Shape of `KEY.prompt_embeds.npy`, `[77, width]`; `null` when there are none.
    pub prompt_embeds_shape: Option<[usize; 2]>,
    /// What is kept of a caption.
    pub text: TextKind,
    /// From an image to the square that was encoded.
    pub image: ImageRecipe,
    /// Which samples there are.
    pub selection: Selection,
}

/// The latents' shape and scale.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatentLayout {
    /// `[2C, h, w]` of one crop: mean, then log-variance.
    pub shape: [usize; 3],
    /// What a latent drawn from the moments is multiplied by before the UNet sees it. Not applied to what is stored.
    pub scaling_factor: f64,
}

/// How images became squares, as in the configuration's `[image]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecipe {
    /// Side of the square. Pixels.
    pub resolution: u32,
    /// Resampling filter.
    pub interpolation: Interpolation,
    /// Which square was kept.
    pub crop: CropMode,
    /// Crops of each sample.
    pub crops: usize,
    /// Whether half of the images are mirrored.
    pub flip: bool,
    /// Whether large JPEGs were decoded at a fraction of their size.
    pub scaled_decode: bool,
    /// What random crops and flips were drawn with; absent when nothing is random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// How samples were chosen, as in the configuration's `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// Extensions of images, in order of preference.
    pub image_keys: Vec<String>,
    /// Extensions of captions, in order of preference.
    pub caption_keys: Vec<String>,
    /// Most samples over all shards; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// How many processes `max_samples` was shared between, as that decides which samples these are; absent without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub world: Option<usize>,
    /// Limits on a sample's json and caption.
    pub filter: Filter,
}

/// What became of one input shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// URL of the input, without what a signed one hides behind its `?`.
    pub source: String,
    /// Samples in the output.
    pub samples: u64,
    /// Samples of the input that are not in the output, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// What was wrong with the input's tar; `null` if nothing was.
    pub broken: Option<String>,
    /// Size of the output.
    pub bytes: u64,
    /// Of the output, hexadecimal.
    pub sha256: String,
}

impl ShardEntry {
    /// How many samples of it count towards `max_samples`: those whose image turned out to be broken do.
    pub(super) fn counted(&self) -> u64 {
        let undecodable = LEFT_OUT_WHEN_DECODED
            .iter()
            .filter_map(|&reason| self.skipped.get(reason));
        self.samples + undecodable.sum::<u64>()
    }
}

impl Recipe {
    /// The recipe that a configuration stands for, with what is known of the encoders.
    pub fn new(
        config: &Config,
        text: TextKind,
        crops: usize,
        fingerprint: Fingerprint,
        latent: LatentLayout,
        prompt_embeds_shape: [usize; 2],
        world: usize,
    ) -> Self {
        let Config { data, image, .. } = config;
        let random = image.crop == CropMode::Random || image.flip;
        Self {
            fingerprint,
            latent,
            prompt_embeds_shape: (text != TextKind::Caption).then_some(prompt_embeds_shape),
            text,
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
    /// Shape of `KEY.latent.npy`: the latents' own, behind the number of crops if there are several.
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

    /// Samples in all shards that are listed.
    pub fn samples(&self) -> u64 {
        self.shards.values().map(|entry| entry.samples).sum()
    }

    /// Reads the text of a manifest. The error says in words what is wrong.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        match value.get("format_version").and_then(Value::as_u64) {
            Some(version) if version == u64::from(FORMAT_VERSION) => {}
            Some(version) => {
                return Err(format!("format_version {version}, needed {FORMAT_VERSION}"));
            }
            None => return Err("format_version is missing".to_owned()),
        }
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    /// Replaces the manifest called `name`.
    pub(super) fn write(&self, place: &Destination, name: &str) -> Result<(), LatentError> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|error| place.failed(name, error.into()))?;
        text.push(b'\n');
        place.write(name, &text)?;
        Ok(())
    }

    /// Refuses, in the name of the manifest at `place`, a recipe that differs, naming the first value that does.
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

/// The first place where two values differ, with both values there.
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
