//! The latent shards of a training run: reads the manifests beside the shards, and checks them against the models.

use std::collections::BTreeMap;
use std::sync::Arc;

use coffey_pipeline::bounded::MAX_FILE_BYTES;
use coffey_pipeline::{
    Content, ImageOptions, LatentShapes, ListedShard, ShardUrl, SourceError, Sources,
};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::manifest::difference;
use super::parts::{MANIFEST, is_manifest};
use super::{Fingerprint, Manifest, Recipe, ShardEntry};
use crate::config::{Config, ConfigError, TextFrom};
use crate::encode::Encoders;
use crate::models::vae::VaeConfig;
use crate::models::{ModelError, TextParts, UNetConfig};
use crate::pretrained::Models;

/// Prefix of the manifests of several processes.
const PARTS: &str = "manifest-";
/// Most names of shards in a message.
const LISTED: usize = 3;

/// Why latent shards can't be trained on.
#[derive(Debug, thiserror::Error)]
pub enum LatentSourceError {
    /// A manifest can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A model's configuration or weights can't be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The configuration contradicts the manifest.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no manifest.
    #[error(
        "{folder}: no {MANIFEST} is there, which says what the latents of a folder are: copy it from where coffey precompute wrote \
         the shards, or set data.kind = \"images\" if they hold images"
    )]
    NoManifest {
        /// The folder without a manifest.
        folder: String,
    },
    /// The shards come from standard input, which has no folder.
    #[error(
        "data.shards = \"-\": latents can't be read from standard input, beside which there is no {MANIFEST}: name a folder, \
         s3://bucket/prefix/ or URLs"
    )]
    Stdin,
    /// A manifest can't be parsed.
    #[error(
        "{manifest}: not a manifest of latent shards that this version reads: {message}; run coffey precompute again"
    )]
    Manifest {
        /// The manifest.
        manifest: String,
        /// The fault.
        message: String,
    },
    /// A shard is in no manifest.
    #[error(
        "{folder}: no manifest there lists {shards}: let coffey precompute finish, or leave what holds no latents out of data.shards"
    )]
    Unlisted {
        /// The shards' folder.
        folder: String,
        /// Names of the first of them.
        shards: String,
    },
    /// Two manifests of one folder list a shard with different contents.
    #[error(
        "{one} and {other} list {shard} with different contents: run coffey precompute --finish, which keeps the one that is there"
    )]
    ListedTwice {
        /// A manifest.
        one: String,
        /// Another manifest.
        other: String,
        /// Name of the shard.
        shard: String,
    },
    /// Two manifests contradict each other.
    #[error(
        "{one} has {field} = {value}, and {other} has {other_value}: latents made in different ways can't be mixed; name shards of \
         one of them in data.shards"
    )]
    Mixed {
        /// A manifest.
        one: String,
        /// The value that differs.
        field: String,
        /// Its value there.
        value: String,
        /// Another manifest.
        other: String,
        /// Its value in that.
        other_value: String,
    },
    /// The weights are not those that made the latents.
    #[error(
        "{manifest}: the latents were made with the {what} {made}, and that in {folder} is {now}: set {key} to the model they were \
         made with, or run coffey precompute with this one"
    )]
    OtherWeights {
        /// The manifest.
        manifest: String,
        /// `VAE`, `text encoder` or another part of the pipeline.
        what: &'static str,
        /// Its fingerprint in the manifest.
        made: String,
        /// Folder of the configured weights.
        folder: String,
        /// Their fingerprint.
        now: String,
        /// Configuration key of the weights.
        key: &'static str,
    },
    /// A size or a factor differs from the models'.
    #[error("{manifest}: {field} is {made}, and {now} in {what}: {remedy}")]
    Unfit {
        /// The manifest.
        manifest: String,
        /// The value that differs.
        field: &'static str,
        /// Its value in the manifest.
        made: String,
        /// The expected value.
        now: String,
        /// Model that the expected value comes from.
        what: String,
        /// The remedy.
        remedy: &'static str,
    },
    /// The shards hold no text embeddings.
    #[error(
        "{manifest}: text is \"caption\", so its shards hold no text embeddings, and data.text_from is \"embeds\": set \
         data.text_from = \"caption\", or run coffey precompute with latents.text = \"embeds\""
    )]
    NoEmbeddings {
        /// The manifest.
        manifest: String,
    },
}

impl LatentSourceError {
    /// Whether the configuration is at fault, so that a retry can't help.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Source(error) => error.is_config(),
            Self::Model(_) => false,
            _ => true,
        }
    }
}

/// The common properties of the latent shards of a run.
#[derive(Clone, Debug)]
pub struct LatentSource {
    /// The manifest for messages.
    manifest: String,
    recipe: Recipe,
    text_from: TextFrom,
    /// Shape of the text embeddings, `[77, width]`; `None` if captions are read instead.
    prompt_embeds: Option<[usize; 2]>,
    /// Shape of the pooled text embeddings of SDXL, `[P]`, where text embeddings are read.
    pooled: Option<[usize; 1]>,
    listed: Arc<[ListedShard]>,
}

impl LatentSource {
    /// Reads the manifests beside `shards` and checks that they list all of them and agree.
    ///
    /// # Errors
    /// [`LatentSourceError`], naming the manifest and what is wrong.
    pub fn open(
        shards: &[ShardUrl],
        text_from: TextFrom,
        sources: &Sources,
        runtime: &Handle,
    ) -> Result<Self, LatentSourceError> {
        let mut folders: Vec<(ShardUrl, Vec<usize>)> = Vec::new();
        for (index, shard) in shards.iter().enumerate() {
            let folder = shard.folder().ok_or(LatentSourceError::Stdin)?;
            match folders.iter_mut().find(|(known, _)| *known == folder) {
                Some((_, indices)) => indices.push(index),
                None => folders.push((folder, vec![index])),
            }
        }
        let mut first: Option<(String, Recipe)> = None;
        let mut listed = vec![None; shards.len()];
        for (folder, indices) in folders {
            let manifests = manifests(&folder, sources, runtime)?;
            let entries = entries(&manifests)?;
            let mut missing = Vec::new();
            for index in indices {
                let name = shards[index].name();
                match entries.get(name.as_str()) {
                    Some((_, entry)) => listed[index] = Some(ListedShard::from(*entry)),
                    None => missing.push(name),
                }
            }
            if !missing.is_empty() {
                let more = match missing.len().saturating_sub(LISTED) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                let shown = &missing[..missing.len().min(LISTED)];
                return Err(LatentSourceError::Unlisted {
                    folder: folder.to_string(),
                    shards: shown.join(", ") + &more,
                });
            }
            for (place, Manifest { recipe, .. }) in manifests {
                match &first {
                    None => first = Some((place, recipe)),
                    Some(first) => agree(first, (&place, &recipe), text_from)?,
                }
            }
        }
        // There is at least one shard: listing fails if there are none.
        let (manifest, recipe) = first.ok_or(LatentSourceError::Stdin)?;
        let prompt_embeds = match (text_from, recipe.prompt_embeds_shape) {
            (TextFrom::Caption, _) => None,
            (TextFrom::Embeds, Some(shape)) => Some(shape),
            (TextFrom::Embeds, None) => return Err(LatentSourceError::NoEmbeddings { manifest }),
        };
        Ok(Self {
            manifest,
            pooled: recipe.pooled_shape.filter(|_| prompt_embeds.is_some()),
            recipe,
            text_from,
            prompt_embeds,
            listed: listed.into_iter().flatten().collect(),
        })
    }

    /// The entry of each shard in its manifest, in the order of the shards that [`LatentSource::open`] took.
    pub fn listed(&self) -> Arc<[ListedShard]> {
        Arc::clone(&self.listed)
    }

    /// The content of the shards, for a stream.
    pub fn content(&self) -> Content {
        Content::Latents(LatentShapes {
            moments: self.recipe.latent.shape,
            prompt_embeds: self.prompt_embeds,
            pooled: self.pooled,
        })
    }

    /// Copies the image settings of the latents to `[image]`.
    ///
    /// # Errors
    /// When the configuration contradicts them.
    pub fn settle(&self, config: &mut Config) -> Result<(), LatentSourceError> {
        let made = &self.recipe.image;
        let image = ImageOptions {
            resolution: made.resolution,
            interpolation: made.interpolation,
            crop: made.crop,
            flip: made.flip,
            scaled_decode: made.scaled_decode,
            ..ImageOptions::default()
        };
        Ok(config.adopt_image_settings(image, &self.manifest)?)
    }

    /// Refuses latents that were made with other weights than those of `models`, or don't fit its networks.
    ///
    /// # Errors
    /// [`LatentSourceError`], with both values; also when a model can't be read.
    pub fn check(&self, models: &Models) -> Result<(), LatentSourceError> {
        let (pipeline, vae) = (&models.pipeline, models.vae.as_deref());
        let vae_folder = Encoders::vae_folder(pipeline, vae);
        let TextParts { first, second } = TextParts::of(pipeline);
        let unet_folder = pipeline.join("unet");
        let unfit = |field, made: String, now: String, what: &std::path::Path, remedy| {
            Err(LatentSourceError::Unfit {
                manifest: self.manifest.clone(),
                field,
                made,
                now,
                what: what.display().to_string(),
                remedy,
            })
        };
        let vae_key = vae.map_or("model.teacher (or model.vae)", |_| "model.vae");
        let vae = VaeConfig::read(&vae_folder)?;
        let side = self.recipe.image.resolution as usize / vae.downscale();
        let (made, now) = (
            self.recipe.latent.shape,
            [2 * vae.latent_channels, side, side],
        );
        let another = "set model.vae to the VAE the latents were made with, or run coffey precompute with this one";
        if made != now {
            let (made, now) = (format!("{made:?}"), format!("{now:?}"));
            return unfit("latent.shape", made, now, &vae_folder, another);
        }
        let (made, now) = (self.recipe.latent.scaling_factor, vae.scaling_factor);
        // Both values were read from files, not computed.
        if made.to_bits() != now.to_bits() {
            let (made, now) = (made.to_string(), now.to_string());
            return unfit("latent.scaling_factor", made, now, &vae_folder, another);
        }
        let remedy = "set model.teacher to a model with the text encoder of the latents, or data.text_from = \"caption\"";
        if let Some(shape @ [_, width]) = self.prompt_embeds {
            let unet = UNetConfig::read(&unet_folder)?;
            let (wanted, pooled) = (unet.cross_attention_dim, unet.pooled_width());
            if self.pooled.map(|[width]| width) != pooled {
                let shown = |width: Option<usize>| match width {
                    Some(width) => format!("[{width}]"),
                    None => "absent".to_owned(),
                };
                let (made, now) = (shown(self.pooled.map(|[width]| width)), shown(pooled));
                return unfit("pooled_shape", made, now, &unet_folder, remedy);
            }
            if width != wanted {
                let (made, now) = (format!("{shape:?}"), format!("[77, {wanted}]"));
                return unfit("prompt_embeds_shape", made, now, &unet_folder, remedy);
            }
        }
        let now = Fingerprint::of(pipeline, models.vae.as_deref())?;
        let made = &self.recipe.fingerprint;
        let mut weights = vec![("VAE", &made.vae, now.vae, vae_folder, vae_key)];
        if self.text_from == TextFrom::Embeds {
            let key = "model.teacher";
            let folder = first.text_encoder;
            weights.push((
                "text encoder",
                &made.text_encoder,
                now.text_encoder,
                folder,
                key,
            ));
            // The shapes of the embeddings agree, so both have a second text encoder or neither.
            if let (Some(made), Some(now), Some(second)) = (&made.second, now.second, second) {
                let folder = second.text_encoder;
                let (made_2, now_2) = (&made.text_encoder_2, now.text_encoder_2);
                weights.push(("second text encoder", made_2, now_2, folder, key));
                let (made_1, made_2) = (&made.tokenizer, &made.tokenizer_2);
                weights.push(("tokenizer", made_1, now.tokenizer, first.tokenizer, key));
                weights.push((
                    "second tokenizer",
                    made_2,
                    now.tokenizer_2,
                    second.tokenizer,
                    key,
                ));
            }
        }
        match weights.into_iter().find(|(_, made, now, ..)| *made != now) {
            None => Ok(()),
            Some((what, made, now, folder, key)) => Err(LatentSourceError::OtherWeights {
                manifest: self.manifest.clone(),
                what,
                made: made.clone(),
                folder: folder.display().to_string(),
                now,
                key,
            }),
        }
    }
}

/// The manifests of a folder with their URLs: the manifest of all shards, or those of several processes.
///
/// # Errors
/// [`LatentSourceError`] if there is no manifest, or one can't be read.
pub fn manifests(
    folder: &ShardUrl,
    sources: &Sources,
    runtime: &Handle,
) -> Result<Vec<(String, Manifest)>, LatentSourceError> {
    let read = |name: &str| -> Result<(String, Manifest), LatentSourceError> {
        let url = folder.join(name);
        let text = runtime.block_on(async {
            let mut reader = sources.open(&url).await?;
            reader.read_to_end(&url, MAX_FILE_BYTES).await
        })?;
        let manifest = url.to_string();
        match Manifest::parse(&text) {
            Ok(parsed) => Ok((manifest, parsed)),
            Err(message) => Err(LatentSourceError::Manifest { manifest, message }),
        }
    };
    match read(MANIFEST) {
        Err(LatentSourceError::Source(SourceError::NotFound { .. })) => {}
        read => return Ok(vec![read?]),
    }
    let parts = match sources.destination(&folder.to_string(), runtime) {
        Ok(place) => place.list(PARTS)?,
        // HTTP has no listing.
        Err(_) => Vec::new(),
    };
    let parts = parts.iter().filter(|part| is_manifest(&part.name));
    let parts = parts
        .map(|part| read(&part.name))
        .collect::<Result<Vec<_>, _>>()?;
    if parts.is_empty() {
        return Err(LatentSourceError::NoManifest {
            folder: folder.to_string(),
        });
    }
    Ok(parts)
}

/// The entries of a folder's manifests with the manifest's URL, by the shard's name.
fn entries(
    manifests: &[(String, Manifest)],
) -> Result<BTreeMap<&str, (&str, &ShardEntry)>, LatentSourceError> {
    let mut entries = BTreeMap::new();
    for (place, manifest) in manifests {
        for (shard, entry) in &manifest.shards {
            let before = entries.insert(shard.as_str(), (place.as_str(), entry));
            if let Some((one, other)) = before
                && other != entry
            {
                return Err(LatentSourceError::ListedTwice {
                    one: one.to_owned(),
                    other: place.clone(),
                    shard: shard.clone(),
                });
            }
        }
    }
    Ok(entries)
}

/// Refuses manifests whose shards can't be in one batch, or that have different image settings.
fn agree(
    (one, first): &(String, Recipe),
    (other, recipe): (&str, &Recipe),
    text_from: TextFrom,
) -> Result<(), LatentSourceError> {
    let kept = |recipe: &Recipe| {
        let embeds = text_from == TextFrom::Embeds;
        let Recipe {
            fingerprint, image, ..
        } = recipe;
        json!({
            "fingerprint": {
                "vae": fingerprint.vae,
                "text_encoder": embeds.then_some(&fingerprint.text_encoder),
                "second": fingerprint.second.as_ref().filter(|_| embeds),
            },
            "encoded_in": {
                "vae": recipe.encoded_in.vae,
                "text_encoder": embeds.then_some(recipe.encoded_in.text_encoder),
            },
            "latent": recipe.latent,
            "prompt_embeds_shape": recipe.prompt_embeds_shape.filter(|_| embeds),
            "pooled_shape": recipe.pooled_shape.filter(|_| embeds),
            // The number of crops and their seed may differ.
            "image": {
                "resolution": image.resolution,
                "interpolation": image.interpolation,
                "crop": image.crop,
                "flip": image.flip,
                "scaled_decode": image.scaled_decode,
            },
        })
    };
    let (a, b): (Value, Value) = (kept(first), kept(recipe));
    match difference("", Some(&a), Some(&b)) {
        None => Ok(()),
        Some((field, value, other_value)) => Err(LatentSourceError::Mixed {
            one: one.clone(),
            field,
            value,
            other: other.to_owned(),
            other_value,
        }),
    }
}
