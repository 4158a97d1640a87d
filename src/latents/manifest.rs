//! The manifest: what all latents of a folder have in common, and what became of each shard.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::aside::replace;
use super::{Fingerprint, LatentError};
use crate::config::{Config, Crop, Filter, Interpolation, TextKind};

/// The version of the format that is written, and the only one that is read.
pub const FORMAT_VERSION: u32 = 1;

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
    /// `[2C, h, w]`: mean, then log-variance.
    pub shape: [usize; 3],
    /// What a latent drawn from the moments is multiplied by before the UNet sees it. Not applied to what is stored.
    pub scaling_factor: f64,
}

/// How images became squares, as in the configuration's `[image]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageRecipe {
    /// Side of the square. Pixels.
    pub resolution: usize,
    /// Resampling filter.
    pub interpolation: Interpolation,
    /// Which square was kept.
    pub crop: Crop,
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
    /// Limits on a sample's json and caption.
    pub filter: Filter,
}

/// What became of one input shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// URL of the input.
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

impl Recipe {
    /// The recipe that a configuration stands for, with what is known of the encoders.
    pub fn new(
        config: &Config,
        text: TextKind,
        crops: usize,
        fingerprint: Fingerprint,
        latent: LatentLayout,
        prompt_embeds_shape: [usize; 2],
    ) -> Self {
        let Config { data, image, .. } = config;
        let random = image.crop == Crop::Random || image.flip;
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
                filter: data.filter.clone().unwrap_or_default(),
            },
        }
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

    /// Reads a manifest.
    ///
    /// # Errors
    /// When the file can't be read, or is none of this version.
    pub fn read(path: &Path) -> Result<Self, LatentError> {
        let text = std::fs::read(path).map_err(LatentError::io(path))?;
        Self::parse(&text).map_err(|message| LatentError::Manifest {
            path: path.to_owned(),
            message,
        })
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

    /// The manifests of a folder with their file names, in name order; none if the folder is not there.
    ///
    /// # Errors
    /// As [`Manifest::read`].
    pub fn read_all(folder: &Path) -> Result<BTreeMap<String, Self>, LatentError> {
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(BTreeMap::new());
            }
            Err(error) => return Err(LatentError::io(folder)(error)),
        };
        let mut manifests = BTreeMap::new();
        for file in files {
            let name = file.map_err(LatentError::io(folder))?.file_name();
            let Some(name) = name.to_str().filter(|name| is_manifest(name)) else {
                continue;
            };
            manifests.insert(name.to_owned(), Self::read(&folder.join(name))?);
        }
        Ok(manifests)
    }

    /// Replaces the file at `path`.
    pub(super) fn write(&self, path: &Path) -> Result<(), LatentError> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| LatentError::io(path)(error.into()))?;
        replace(path, (text + "\n").as_bytes())
    }

    /// Refuses, in the name of the manifest at `path`, a recipe that differs, naming the first value that does.
    pub(super) fn check(&self, path: &Path, now: &Recipe) -> Result<(), LatentError> {
        let as_json = |recipe: &Recipe| {
            serde_json::to_value(recipe).map_err(|error| LatentError::Manifest {
                path: path.to_owned(),
                message: error.to_string(),
            })
        };
        let (written, now) = (as_json(&self.recipe)?, as_json(now)?);
        match difference("", Some(&written), Some(&now)) {
            None => Ok(()),
            Some((field, written, now)) => Err(LatentError::OtherRecipe {
                manifest: path.to_owned(),
                field,
                written,
                now,
            }),
        }
    }
}

/// `manifest.json` or `manifest-RANK-of-WORLD.json`.
pub(super) fn is_manifest(name: &str) -> bool {
    name == "manifest.json" || (name.starts_with("manifest-") && name.ends_with(".json"))
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
