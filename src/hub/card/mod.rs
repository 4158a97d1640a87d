//! The model card, `README.md`: the teacher, the data, the training figures, and code that draws with the student.
//!
//! It is written from a finished run's folder and its configuration. The card is public: it never shows folders, servers or
//! signatures in URLs.

mod usage;

use std::fs;
use std::path::Path;

use coffey_pipeline::counted;
use serde::Deserialize;

use super::public::{PublicModel, public_config, public_model, public_url};
use super::{HubError, io};
use crate::config::{Config, Lora, LoraLayout, LossKind, ObjectiveKind};
use crate::lora::{self, DIFFUSERS_FILE, KOHYA_FILE};

/// Steps that the card's loss is averaged over.
const LOSS_STEPS: usize = 100;

/// The model card of a finished run.
#[derive(Clone, Copy, Debug)]
pub struct Card<'a> {
    /// The run's configuration.
    pub config: &'a Config,
    /// The repository on the Hub.
    pub id: &'a str,
    /// The run's folder.
    pub folder: &'a Path,
}

fn model_name(objective: ObjectiveKind) -> &'static str {
    match objective {
        ObjectiveKind::Lcm => "Latent Consistency Model",
        ObjectiveKind::Tcd => "Trajectory Consistency Model",
        ObjectiveKind::Pcm => "Phased Consistency Model",
    }
}

/// Keys of a line of `metrics.jsonl` that the card uses.
#[derive(Deserialize)]
struct MetricsLine {
    step: u64,
    loss: f64,
    samples: u64,
    endpoint_error: Option<f64>,
}

impl Card<'_> {
    /// File name of the card, in the run's folder and in the repository.
    pub const NAME: &'static str = "README.md";

    /// Paths in the run's folder of the files to push: the card, the student (a LoRA, or a UNet and its moving average), and the card's
    /// pictures.
    pub fn files(&self) -> Vec<String> {
        let mut files = vec![Self::NAME.to_owned(), "loss.png".to_owned()];
        match &self.config.lora {
            Some(lora) => {
                files.extend(lora_files(lora).map(|file| format!("{}/{file}", lora::FOLDER)))
            }
            None => {
                for model in ["unet", "unet_target"] {
                    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
                        files.push(format!("{model}/{file}"));
                    }
                }
            }
        }
        files.extend(self.pictures().into_iter().map(|(name, _)| name));
        files
    }

    /// Writes the card into the run's folder.
    ///
    /// # Errors
    /// When a file of the run can't be read or the card can't be written.
    pub fn write(&self) -> Result<(), HubError> {
        let path = self.folder.join(Self::NAME);
        fs::write(&path, self.text()?).map_err(io(&path))
    }

    fn text(&self) -> Result<String, HubError> {
        let teacher = self.teacher();
        let lines = self.lines()?;
        let mut text = front_matter(&teacher, self.config.lora.is_some());
        let name = self.id.rsplit('/').next().unwrap_or(self.id);
        let (linked, note) = match &teacher {
            PublicModel::Hub(id) => (format!("[{id}](https://huggingface.co/{id})"), ""),
            PublicModel::Private(name) => (format!("`{name}`"), ", a model that is not on the Hub"),
        };
        text += &format!(
            "\n# {name}\n\nA {}: {} {linked}{note}, distilled so that one to eight steps make an image. Trained with coffey \
             {}.\n\n",
            model_name(self.config.distill.objective),
            match &self.config.lora {
                Some(_) => "a LoRA for",
                None => "the UNet of",
            },
            env!("CARGO_PKG_VERSION")
        );
        text += &self.usage(&teacher)?;
        let pictures = self.pictures();
        if !pictures.is_empty() {
            text += "\n## Samples\n";
            for (file, about) in &pictures {
                text += &format!("\n{about}\n\n![{about}]({file})\n");
            }
        }
        text += &self.data();
        text += &self.training(&lines);
        let configuration = public_config(self.config, &teacher);
        text += &format!(
            "\n<details><summary>Configuration</summary>\n\n{}\n</details>\n",
            code_block(&configuration)
        );
        Ok(text)
    }

    fn teacher(&self) -> PublicModel {
        self.config
            .model
            .teacher
            .as_ref()
            .map_or(PublicModel::Private("a teacher".to_owned()), public_model)
    }

    fn lines(&self) -> Result<Vec<MetricsLine>, HubError> {
        let path = self.folder.join("metrics.jsonl");
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        text.lines()
            .map(|line| serde_json::from_str(line).map_err(|error| io(&path)(error.into())))
            .collect()
    }

    /// Path and caption of the newest pictures.
    fn pictures(&self) -> Vec<(String, &'static str)> {
        let comparison = "samples/comparison.png";
        if self.folder.join(comparison).is_file() {
            let about = match &self.config.lora {
                Some(_) => "The same noise and prompts, by the teacher and by the student",
                None => {
                    "The same noise and prompts, by the teacher and by the student (its moving average)"
                }
            };
            return vec![(comparison.to_owned(), about)];
        }
        let grids = [
            ("online", "By the student"),
            ("target", "By its moving average"),
        ];
        let newest = |kind: &str| -> Option<String> {
            let entries = self.folder.join("samples").read_dir().ok()?;
            let step = entries.flatten().filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let step = name.strip_prefix("step-")?;
                step.strip_suffix(&format!("-{kind}.png"))?
                    .parse::<u64>()
                    .ok()
            });
            Some(format!("samples/step-{}-{kind}.png", step.max()?))
        };
        grids
            .into_iter()
            .filter_map(|(kind, about)| Some((newest(kind)?, about)))
            .collect()
    }

    fn data(&self) -> String {
        let Config { data, image, .. } = self.config;
        let shards: Vec<String> = data
            .shards
            .iter()
            .map(|shard| public_url(&shard.to_string()))
            .collect();
        let filter = match &data.filter {
            None => "every sample with a caption",
            Some(_) => "samples that pass `data.filter` of the configuration below",
        };
        format!(
            "\n## Data\n\n- WebDataset shards: {}\n- Samples: {filter}\n- Resolution: {side} x {side}\n",
            shards
                .iter()
                .map(|shard| format!("`{shard}`"))
                .collect::<Vec<_>>()
                .join(", "),
            side = image.resolution,
        )
    }

    fn training(&self, lines: &[MetricsLine]) -> String {
        let Config {
            train,
            distill,
            optimizer,
            ..
        } = self.config;
        let loss = match distill.loss {
            LossKind::Huber => format!("Huber, c = {}", distill.huber_c),
            LossKind::L2 => "mean squared error".to_owned(),
        };
        let mut rows = vec![
            (
                "batch size".to_owned(),
                (train.batch_size * train.gradient_accumulation).to_string(),
            ),
            (
                "learning rate".to_owned(),
                format!("{:e}", optimizer.learning_rate),
            ),
            ("loss".to_owned(), loss),
        ];
        if let Some(last) = lines.last() {
            rows.insert(0, ("steps".to_owned(), last.step.to_string()));
            rows.insert(1, ("samples seen".to_owned(), last.samples.to_string()));
            let tail = &lines[lines.len().saturating_sub(LOSS_STEPS)..];
            let mean = tail.iter().map(|line| line.loss).sum::<f64>() / tail.len() as f64;
            rows.push((
                format!("loss, mean of the last {}", counted(tail.len(), "step")),
                format!("{mean:.5}"),
            ));
        }
        if let Some(lora) = &self.config.lora {
            rows.push(("LoRA's rank".to_owned(), lora.rank.to_string()));
        }
        if let Some(error) = lines.iter().rev().find_map(|line| line.endpoint_error) {
            let whose = match &self.config.lora {
                Some(_) => "the student's",
                None => "the moving average's",
            };
            rows.push((
                format!(
                    "endpoint error: mean squared distance in latent space of {whose} 1-step samples from the teacher's 50-step samples"
                ),
                format!("{error:.5}"),
            ));
        }
        let mut text = "\n## Training\n\n| | |\n| --- | --- |\n".to_owned();
        for (what, value) in rows {
            text += &format!("| {what} | {value} |\n");
        }
        text += "\n![Loss](loss.png)\n";
        text
    }
}

/// Files of the folder of a LoRA.
fn lora_files(lora: &Lora) -> impl Iterator<Item = &'static str> {
    let files = [
        (LoraLayout::Peft, DIFFUSERS_FILE),
        (LoraLayout::Kohya, KOHYA_FILE),
    ];
    let saved = files.map(|(layout, file)| lora.save.contains(&layout).then_some(file));
    saved.into_iter().flatten()
}

/// Names no licence: it depends on the teacher's and the data's, which the user has to judge.
fn front_matter(teacher: &PublicModel, is_lora: bool) -> String {
    let lora = if is_lora { "- lora\n" } else { "" };
    let base = match teacher {
        PublicModel::Hub(id) => format!("base_model: {id}\n"),
        PublicModel::Private(_) => String::new(),
    };
    format!(
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n{base}tags:\n- latent-consistency-model\n{lora}- \
         text-to-image\n- diffusers\n- coffey\n---\n"
    )
}

fn code_block(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &[&str]) -> Config {
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        Config::parse(
            "[data]\nshards = [\"https://me:secret@host/{0..3}.tar?signature=secret\", \"/home/me/a.tar\"]\n",
            "a.toml",
            &more,
        )
        .unwrap()
    }

    fn finished(folder: &Path) {
        let line = |step: u64| {
            format!(
                "{{\"step\":{step},\"loss\":0.5,\"samples\":{},\"epoch\":0}}\n",
                4 * step
            )
        };
        let lines: String = (1..=3).map(line).collect();
        fs::write(folder.join("metrics.jsonl"), lines).unwrap();
        fs::write(folder.join("run.json"), "{\"revision\":\"0123abc\"}").unwrap();
    }

    #[test]
    fn card_shows_the_run_and_hides_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        finished(folder.path());
        let config = config(&[
            "model.teacher=user/teacher",
            "model.vae=/home/me/vae",
            "train.output=/home/me/run",
            "data.cache_dir=/home/me/cache",
            "s3.endpoint_url=http://internal:9000",
            "distill.w_min=8",
            "validation.prompts=['a \"red\" apple']",
        ]);
        let card = Card {
            config: &config,
            id: "user/student",
            folder: folder.path(),
        };
        card.write().unwrap();
        let text = fs::read_to_string(folder.path().join("README.md")).unwrap();
        for private in ["/home", "secret", "signature", "internal", "me:secret"] {
            assert!(!text.contains(private), "{private}: {text}");
        }
        for expected in [
            "base_model: user/teacher\n",
            "\n# student\n",
            "https://host/{0..3}.tar",
            "`a.tar`",
            "\"user/teacher\", revision=\"0123abc\", unet=unet",
            "from_pretrained(\"user/student\", subfolder=\"unet\", torch_dtype=dtype)",
            "\"a \\\"red\\\" apple\"",
            "guidance_scale=9.0",
            "| steps | 3 |",
            "| samples seen | 12 |",
            "mean of the last 3 steps | 0.50000 |",
            "vae = \"vae\"",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(
            !text.contains("license") && !text.contains("samples/"),
            "{text}"
        );
    }

    #[test]
    fn card_shows_the_newest_pictures() {
        let folder = tempfile::tempdir().unwrap();
        finished(folder.path());
        let config = config(&["model.teacher=somewhere"]);
        let card = Card {
            config: &config,
            id: "user/student",
            folder: folder.path(),
        };
        let samples = folder.path().join("samples");
        fs::create_dir(&samples).unwrap();
        for name in [
            "step-20-online",
            "step-100-online",
            "step-100-target",
            "other",
        ] {
            fs::write(samples.join(format!("{name}.png")), "").unwrap();
        }
        let files = card.files();
        let pictures = &files[6..];
        assert_eq!(
            pictures,
            ["samples/step-100-online.png", "samples/step-100-target.png"]
        );
        fs::write(samples.join("comparison.png"), "").unwrap();
        assert_eq!(card.files()[6..], ["samples/comparison.png"]);
        let text = card.text().unwrap();
        assert!(text.contains("![The same noise") && text.contains("(samples/comparison.png)"));
        assert!(
            !text.contains("base_model") && text.contains("teacher = \"somewhere\""),
            "{text}"
        );
    }

    #[test]
    fn card_of_a_lora_loads_it() {
        let folder = tempfile::tempdir().unwrap();
        finished(folder.path());
        let config = config(&["model.teacher=user/teacher", "lora.rank=8"]);
        let card = Card {
            config: &config,
            id: "user/student",
            folder: folder.path(),
        };
        assert_eq!(
            card.files()[2..],
            [
                "unet_lora/pytorch_lora_weights.safetensors",
                "unet_lora/lora_kohya.safetensors"
            ]
        );
        let text = card.text().unwrap();
        for expected in [
            "- lora\n",
            "a LoRA for [user/teacher]",
            "subfolder=\"unet_lora\", weight_name=\"pytorch_lora_weights.safetensors\")",
            "guidance_scale=1.0",
            "guidance 1 (off) to 2",
            "`unet_lora/lora_kohya.safetensors`",
            "| LoRA's rank | 8 |",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(!text.contains("UNet2DConditionModel"), "{text}");
    }
}
