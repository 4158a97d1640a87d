//! The folders of the parts of a pipeline: of a model, or of the teacher that a run was distilled from.

use std::path::{Path, PathBuf};

use crate::config::{Model, ModelPlace, ModelRef};
use crate::encode::Encoders;
use crate::models::{UNetConfig, further_inputs};
use crate::sample::SampleScheduler;

use super::Failure;
use crate::cli::run_description::{ModelRequest, Part, RunDescription, environments_s3};

/// Folders of a pipeline besides its UNet.
const SURROUNDINGS: [&str; 4] = ["scheduler", "text_encoder", "tokenizer", "vae"];

/// Folders of one pipeline.
#[derive(Debug, PartialEq)]
pub(super) struct PipelineFolders {
    /// UNet that draws.
    pub(super) unet: PathBuf,
    /// Folder of the other parts.
    pub(super) pipeline: PathBuf,
    /// Autoencoder from another folder.
    pub(super) vae: Option<PathBuf>,
    /// Sampler of the run that the UNet is from; `None` for a UNet of no run.
    pub(super) scheduler: Option<SampleScheduler>,
}

/// Models named on the command line besides the one that draws.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given<'a> {
    /// The pipeline of the other parts.
    pub(super) teacher: Option<&'a ModelRef>,
    /// Its revision, if it is on the Hub.
    pub(super) revision: &'a str,
    /// Another autoencoder than that of the pipeline.
    pub(super) vae: Option<&'a ModelRef>,
    /// The model that draws is the run of a LoRA, whose UNet is that of the pipeline.
    pub(super) of_lora: bool,
}

impl PipelineFolders {
    /// Looks in `model`, then in the models `given` on the command line, then in those that the run names. `fetch` gives the local
    /// folder of a model.
    pub(super) fn find(
        model: &Path,
        unet: Option<&str>,
        given: Given<'_>,
        fetch: impl Fn(&ModelRequest<'_>) -> Result<PathBuf, Failure>,
    ) -> Result<Self, Failure> {
        let unet = match given.of_lora {
            true => None,
            false => Some(find_unet(model, unet)?),
        };
        let part = match given.of_lora {
            true => Part::Pipeline,
            false => Part::Surroundings,
        };
        let whole = given.teacher.is_none() && missing(model).is_empty();
        let run = match whole {
            true => None,
            false => RunDescription::find(model)?,
        };
        let fetch_given = |model, revision, part| {
            fetch(&ModelRequest {
                model,
                revision,
                part,
                s3: run
                    .as_ref()
                    .map_or_else(environments_s3, RunDescription::s3),
            })
        };
        let vae = match (given.vae, &run) {
            (Some(vae), _) => Some(fetch_given(vae, Model::MAIN, Part::Vae)?),
            (None, Some(run)) if run.has_vae() => Some(run.fetch(Part::Vae, &fetch)?),
            (None, _) => None,
        };
        let pipeline = match (given.teacher, &run) {
            _ if whole => model.to_owned(),
            (Some(teacher), _) => fetch_given(teacher, given.revision, part)?,
            (None, Some(run)) => run.fetch(part, &fetch)?,
            (None, None) => {
                return failed(format!(
                    "{} has no {}, and no run.json beside it says where they are; give --teacher DIR",
                    model.display(),
                    missing(model).join(", ")
                ));
            }
        };
        let missing = missing(&pipeline);
        if !missing.is_empty() {
            return failed(format!(
                "{} has no {}; --teacher DIR names the folder that has",
                pipeline.display(),
                missing.join(", ")
            ));
        }
        let unet = match unet {
            Some(unet) => unet,
            None => find_unet(&pipeline, Some("unet"))?,
        };
        Ok(Self {
            unet,
            pipeline,
            vae,
            scheduler: run.as_ref().map(RunDescription::scheduler),
        })
    }

    /// Folder of the autoencoder.
    pub(super) fn vae_folder(&self) -> PathBuf {
        Encoders::vae_folder(&self.pipeline, self.vae.as_deref())
    }

    /// Checks that the UNet fits the other parts.
    ///
    /// # Errors
    /// The first width that differs.
    pub(super) fn check_fit(&self, unet: &UNetConfig, encoders: &Encoders) -> Result<(), Failure> {
        let latents = encoders.vae().config().latent_channels;
        let pairs = [
            (
                "the width of the text embeddings",
                unet.cross_attention_dim,
                encoders.text().width(),
                String::new(),
            ),
            (
                "the width of the pooled text embedding (0: none)",
                unet.pooled_width().unwrap_or(0),
                encoders.text().pooled_width().unwrap_or(0),
                String::new(),
            ),
            (
                "the number of latent channels",
                unet.in_channels,
                latents,
                further_inputs(unet.in_channels, latents),
            ),
            (
                "the number of channels that the UNet makes",
                unet.out_channels,
                latents,
                String::new(),
            ),
        ];
        for (what, needed, found, note) in pairs {
            if needed != found {
                return failed(format!(
                    "{} and {} do not belong together: {what} is {needed} in the one and {found} in the other{note}",
                    self.unet.display(),
                    self.pipeline.display(),
                ));
            }
        }
        Ok(())
    }
}

fn failed<T>(message: String) -> Result<T, Failure> {
    Err(Failure::Failed(message.into()))
}

/// Parts besides the UNet that a folder lacks.
fn missing(folder: &Path) -> Vec<&'static str> {
    SURROUNDINGS
        .into_iter()
        .filter(|part| !folder.join(part).is_dir())
        .collect()
}

/// The folder around that of a UNet, with the UNet's name: of `runs/first/unet`, `runs/first` and `unet`.
pub(super) fn around_unet(model: &ModelRef) -> Option<(ModelRef, String)> {
    let Ok(ModelPlace::Folder(folder)) = model.place() else {
        return None;
    };
    UNetConfig::read(&folder).ok()?;
    // Absolute, so that a relative "unet" has a parent.
    let folder = std::path::absolute(folder).ok()?;
    let parent = folder.parent()?.to_str()?;
    let name = folder.file_name()?.to_str()?;
    Some((parent.to_owned().into(), name.to_owned()))
}

/// The failure to fetch a model, as a mistake on the command line if the model is a local folder without the UNet.
pub(super) fn without_unet(failure: Failure, model: &ModelRef, name: Option<&str>) -> Failure {
    let Ok(ModelPlace::Folder(folder)) = model.place() else {
        return failure;
    };
    if unet_folder(&folder, name).is_some() {
        return failure;
    }
    if let Some(name) = name {
        return Failure::Usage(format!("--unet {name}: no folder {name} in {model}").into());
    }
    if folder.join("run.json").is_file() {
        let message = match newest_checkpoint(&folder) {
            None => "has no checkpoint yet (no unet_target/ or unet/); train it first".to_owned(),
            Some(checkpoint) => format!(
                "has no unet_target/ or unet/ yet; name one of its checkpoints, as {}",
                checkpoint.display()
            ),
        };
        return Failure::Usage(format!("--model {model} {message}").into());
    }
    match failure {
        Failure::Failed(error) => Failure::Usage(error),
        other => other,
    }
}

/// Folder of the newest checkpoint of a run.
fn newest_checkpoint(run: &Path) -> Option<PathBuf> {
    let entries = run.read_dir().ok()?.filter_map(Result::ok);
    let steps = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("checkpoint-")?.parse::<u64>().ok()
    });
    Some(run.join(format!("checkpoint-{}", steps.max()?)))
}

/// Names of the UNet's folder, in order of preference.
fn unet_names(name: Option<&str>) -> Vec<&str> {
    name.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name])
}

fn unet_folder(model: &Path, name: Option<&str>) -> Option<PathBuf> {
    unet_names(name)
        .into_iter()
        .map(|name| model.join(name))
        .find(|folder| folder.is_dir())
}

fn find_unet(model: &Path, name: Option<&str>) -> Result<PathBuf, Failure> {
    match unet_folder(model, name) {
        Some(folder) => Ok(folder),
        None => failed(format!(
            "{} has no folder {}",
            model.display(),
            unet_names(name).join(" or ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(root: &Path, names: &[&str]) {
        for name in names {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
    }

    /// Every model is in a folder of its name; an autoencoder is called "elsewhere".
    fn find(model: &Path, unet: Option<&str>) -> Result<PipelineFolders, Failure> {
        let given = Given {
            teacher: None,
            revision: Model::MAIN,
            vae: None,
            of_lora: false,
        };
        PipelineFolders::find(model, unet, given, |request| {
            assert_eq!(
                request.part == Part::Vae,
                request.model.as_str() == "elsewhere"
            );
            Ok(request.model.as_str().into())
        })
    }

    fn message(result: Result<PipelineFolders, Failure>) -> String {
        match result.unwrap_err() {
            Failure::Failed(error) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pipeline_folders_are_those_of_a_whole_pipeline() {
        let root = tempfile::tempdir().unwrap();
        folders(
            root.path(),
            &[
                "scheduler",
                "text_encoder",
                "tokenizer",
                "vae",
                "unet",
                "unet_target",
            ],
        );
        let found = find(root.path(), None).unwrap();
        assert_eq!(found.unet, root.path().join("unet_target"));
        assert_eq!(found.pipeline, root.path());
        let found = find(root.path(), Some("unet")).unwrap();
        assert_eq!(found.unet, root.path().join("unet"));
        assert!(message(find(root.path(), Some("other"))).contains("no folder other"));
    }

    #[test]
    fn pipeline_folders_of_a_run_are_its_teachers() {
        let root = tempfile::tempdir().unwrap();
        let (run, teacher) = (root.path().join("run"), root.path().join("teacher"));
        folders(&run, &["unet", "checkpoint-5/unet"]);
        let alone = message(find(&run, None));
        assert!(
            alone.contains("--teacher") && alone.contains("text_encoder"),
            "{alone}"
        );
        std::fs::write(
            run.join("run.json"),
            serde_json::json!({"teacher": teacher, "vae": "elsewhere"}).to_string(),
        )
        .unwrap();
        let absent = message(find(&run, None));
        assert!(absent.contains("teacher has no scheduler"), "{absent}");
        folders(&teacher, &SURROUNDINGS);
        for model in [run.clone(), run.join("checkpoint-5")] {
            let found = find(&model, None).unwrap();
            assert_eq!(
                (found.pipeline, found.vae),
                (teacher.clone(), Some("elsewhere".into()))
            );
        }
        std::fs::write(run.join("run.json"), "{}").unwrap();
        assert!(message(find(&run, None)).contains("run.json: missing field `teacher`"));
    }
}
