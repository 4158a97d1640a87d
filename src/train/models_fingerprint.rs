//! What a checkpoint keeps of the models a run began with, so that a resume takes them from any place, and no others.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::TrainError;
use crate::diffusion::scheduler_settings;
use crate::encode::Encoders;
use crate::models::unet::WEIGHTS_STEM;
use crate::models::{ClipTokenizer, TEXT_ENCODER_STEM, fingerprint, settings, weights_file};
use crate::pretrained::Models;

/// Hexadecimal digits of a fingerprint in a message.
const SHOWN_DIGITS: usize = 12;

/// Fingerprints of teacher, autoencoder, text encoder and tokenizer, and the settings of theirs that the weights do not imply.
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
}

impl ModelsFingerprint {
    /// Reads the files of a run's models. Weights are hashed in parallel.
    pub(super) fn of(models: &Models) -> Result<Self, TrainError> {
        let [
            unet_folder,
            vae_folder,
            text_folder,
            tokenizer_folder,
            scheduler_folder,
        ] = folders(models);
        let (unet, (vae, text_encoder)) = rayon::join(
            || fingerprint(&unet_folder, WEIGHTS_STEM),
            || {
                rayon::join(
                    || fingerprint(&vae_folder, WEIGHTS_STEM),
                    || fingerprint(&text_folder, TEXT_ENCODER_STEM),
                )
            },
        );
        let vae_keys = [
            ("act_fn", json!("silu")),
            ("norm_num_groups", json!(32)),
            ("scaling_factor", json!(0.18215)),
        ];
        let text_encoder_keys = [
            ("hidden_act", json!("quick_gelu")),
            ("layer_norm_eps", json!(1e-5)),
            ("num_attention_heads", json!(8)),
        ];
        Ok(Self {
            unet: unet?,
            vae: vae?,
            text_encoder: text_encoder?,
            tokenizer: ClipTokenizer::load(&tokenizer_folder)?.fingerprint()?,
            vae_settings: settings(&vae_folder, &vae_keys)?,
            text_encoder_settings: settings(&text_folder, &text_encoder_keys)?,
            schedule: scheduler_settings(&scheduler_folder)?,
        })
    }

    /// What of `models`, whose fingerprint is `now`, is another than before: part and file of each. Settings that only one of the two
    /// versions of coffey knows are not compared.
    pub(super) fn changes(&self, now: &Self, models: &Models) -> Vec<String> {
        let [unet, vae, text, tokenizer, scheduler] = folders(models);
        let weights =
            |folder: &PathBuf, stem| weights_file(folder, stem).unwrap_or_else(|_| folder.clone());
        let contents = [
            ("UNet", weights(&unet, WEIGHTS_STEM), &self.unet, &now.unet),
            ("VAE", weights(&vae, WEIGHTS_STEM), &self.vae, &now.vae),
            (
                "text encoder",
                weights(&text, TEXT_ENCODER_STEM),
                &self.text_encoder,
                &now.text_encoder,
            ),
            ("tokenizer", tokenizer, &self.tokenizer, &now.tokenizer),
        ];
        let mut changes = Vec::new();
        for (part, file, was, now) in contents {
            if was != now {
                let (was, now) = (short(was), short(now));
                let file = file.display();
                changes.push(format!("the {part} ({file}) was {was} and is {now}"));
            }
        }
        let settings = [
            (
                "VAE",
                vae.join("config.json"),
                &self.vae_settings,
                &now.vae_settings,
            ),
            (
                "text encoder",
                text.join("config.json"),
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

/// Folders of UNet, autoencoder, text encoder, tokenizer and scheduler.
fn folders(models: &Models) -> [PathBuf; 5] {
    let pipeline = &models.pipeline;
    let [vae, text_encoder] = Encoders::folders(pipeline, models.vae.as_deref());
    [
        pipeline.join("unet"),
        vae,
        text_encoder,
        pipeline.join("tokenizer"),
        pipeline.join("scheduler"),
    ]
}

/// The first digits of a fingerprint.
fn short(fingerprint: &str) -> &str {
    let digits = fingerprint.find(':').map_or(0, |colon| colon + 1);
    fingerprint
        .get(..digits + SHOWN_DIGITS)
        .unwrap_or(fingerprint)
}
