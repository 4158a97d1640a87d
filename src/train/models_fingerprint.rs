//! What a checkpoint keeps of the models a run began with, so that a resume takes them from any place, and no others.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::TrainError;
use crate::diffusion::scheduler_settings;
use crate::encode::Encoders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{
    ClipTokenizer, TEXT_ENCODER_STEM, TextPart, TextParts, fingerprint, settings, weights_file,
};
use crate::pretrained::Models;

/// Hexadecimal digits of a fingerprint in a message.
const SHOWN_DIGITS: usize = 12;

/// Fingerprints of teacher, autoencoder, text encoders and tokenizers, and the settings of theirs that the weights do not imply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct ModelsFingerprint {
    unet: String,
    vae: String,
    text_encoder: String,
    tokenizer: String,
    /// Values of the keys of `config.json`.
    vae_settings: Map<String, Value>,
    text_encoder_settings: Map<String, Value>,
    /// Values of the keys of `scheduler_config.json`.
    schedule: Map<String, Value>,
    /// The second text encoder of SDXL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    second_text: Option<TextFingerprint>,
}

/// Fingerprints of a text encoder and its tokenizer, and settings that the weights do not imply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct TextFingerprint {
    text_encoder: String,
    tokenizer: String,
    /// Values of the keys of `config.json`.
    settings: Map<String, Value>,
}

impl TextFingerprint {
    /// `keys`: keys of `config.json` besides those of every text encoder, with their defaults.
    fn of(part: &TextPart, keys: &[(&str, Value)]) -> Result<Self, TrainError> {
        let every = [
            ("hidden_act", json!("quick_gelu")),
            ("layer_norm_eps", json!(1e-5)),
            ("num_attention_heads", json!(8)),
        ];
        Ok(Self {
            text_encoder: fingerprint(&part.text_encoder, TEXT_ENCODER_STEM)?,
            tokenizer: ClipTokenizer::load(&part.tokenizer)?.fingerprint()?,
            settings: settings(&part.text_encoder, &[&every[..], keys].concat())?,
        })
    }
}

impl ModelsFingerprint {
    /// Reads the files of a run's models. Weights are hashed in parallel.
    pub(super) fn of(models: &Models) -> Result<Self, TrainError> {
        let Folders {
            unet: unet_folder,
            vae: vae_folder,
            scheduler,
            text: TextParts { first, second },
        } = Folders::of(models);
        let (unet, (vae, (text, second))) = rayon::join(
            || fingerprint(&unet_folder, WEIGHTS_STEM),
            || {
                rayon::join(
                    || fingerprint(&vae_folder, WEIGHTS_STEM),
                    || {
                        let of_second = |second: &TextPart| {
                            TextFingerprint::of(second, &[("eos_token_id", json!(49407))])
                        };
                        rayon::join(
                            || TextFingerprint::of(&first, &[]),
                            || second.as_ref().map(of_second).transpose(),
                        )
                    },
                )
            },
        );
        let vae_keys = [
            ("act_fn", json!("silu")),
            ("norm_num_groups", json!(32)),
            ("scaling_factor", json!(0.18215)),
        ];
        let text = text?;
        Ok(Self {
            unet: unet?,
            vae: vae?,
            text_encoder: text.text_encoder,
            tokenizer: text.tokenizer,
            vae_settings: settings(&vae_folder, &vae_keys)?,
            text_encoder_settings: text.settings,
            schedule: scheduler_settings(&scheduler)?,
            second_text: second?,
        })
    }

    /// What of `models`, whose fingerprint is `now`, is another than before: part and file of each. Settings that only one of the two
    /// versions of coffey knows are not compared.
    pub(super) fn changes(&self, now: &Self, models: &Models) -> Vec<String> {
        let Folders {
            unet,
            vae,
            scheduler,
            text: TextParts { first, second },
        } = Folders::of(models);
        let weights =
            |folder: &Path, stem| weights_file(folder, stem).unwrap_or_else(|_| folder.to_owned());
        let text_weights = |part: &TextPart| weights(&part.text_encoder, TEXT_ENCODER_STEM);
        let mut contents = vec![
            ("UNet", weights(&unet, WEIGHTS_STEM), &self.unet, &now.unet),
            ("VAE", weights(&vae, WEIGHTS_STEM), &self.vae, &now.vae),
            (
                "text encoder",
                text_weights(&first),
                &self.text_encoder,
                &now.text_encoder,
            ),
            (
                "tokenizer",
                first.tokenizer,
                &self.tokenizer,
                &now.tokenizer,
            ),
        ];
        let mut settings = vec![
            (
                "VAE",
                vae.join("config.json"),
                &self.vae_settings,
                &now.vae_settings,
            ),
            (
                "text encoder",
                first.text_encoder.join("config.json"),
                &self.text_encoder_settings,
                &now.text_encoder_settings,
            ),
            (
                "noise schedule",
                scheduler.join("scheduler_config.json"),
                &self.schedule,
                &now.schedule,
            ),
        ];
        // Two models of which only one has a second text encoder have other UNets.
        if let (Some(was), Some(now), Some(part)) = (&self.second_text, &now.second_text, second) {
            contents.push((
                "second text encoder",
                text_weights(&part),
                &was.text_encoder,
                &now.text_encoder,
            ));
            contents.push((
                "second tokenizer",
                part.tokenizer,
                &was.tokenizer,
                &now.tokenizer,
            ));
            settings.push((
                "second text encoder",
                part.text_encoder.join("config.json"),
                &was.settings,
                &now.settings,
            ));
        }
        let mut changes = Vec::new();
        for (part, file, was, now) in contents {
            if was != now {
                let (was, now) = (short(was), short(now));
                let file = file.display();
                changes.push(format!("the {part} ({file}) was {was} and is {now}"));
            }
        }
        for (part, file, was, now) in settings {
            let both = was
                .iter()
                .filter_map(|(key, was)| Some((key, was, now.get(key)?)));
            for (key, was, now) in both.filter(|(_, was, now)| was != now) {
                let file = file.display();
                changes.push(format!(
                    "{key} of the {part} ({file}) was {was} and is {now}"
                ));
            }
        }
        changes
    }
}

/// Folders of the models of a run.
struct Folders {
    unet: PathBuf,
    vae: PathBuf,
    scheduler: PathBuf,
    text: TextParts,
}

impl Folders {
    fn of(models: &Models) -> Self {
        let pipeline = &models.pipeline;
        Self {
            unet: pipeline.join("unet"),
            vae: Encoders::vae_folder(pipeline, models.vae.as_deref()),
            scheduler: pipeline.join("scheduler"),
            text: TextParts::of(pipeline),
        }
    }
}

/// The first digits of a fingerprint.
fn short(fingerprint: &str) -> &str {
    let digits = fingerprint.find(':').map_or(0, |colon| colon + 1);
    fingerprint
        .get(..digits + SHOWN_DIGITS)
        .unwrap_or(fingerprint)
}
