//! The folders of the parts of a pipeline: of a model, or of the teacher that a run was distilled from.

use std::path::{Path, PathBuf};

use coffey_pipeline::S3Options;
use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};

use crate::config::{Config, Model, ModelRef};
use crate::encode::Encoders;
use crate::models::{UNetConfig, further_inputs};

use super::Failure;

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
}

/// A model that is needed in a local folder.
#[derive(Debug)]
pub(super) struct ModelRequest<'a> {
    /// The model.
    pub(super) model: &'a ModelRef,
    /// Revision, if the model is on the Hub.
    pub(super) revision: &'a str,
    /// Fetch the autoencoder alone.
    pub(super) only_vae: bool,
    /// Access to S3.
    pub(super) s3: S3Options,
}

/// `run.json`, which `coffey train` writes into the folder of a run.
#[derive(serde::Deserialize)]
struct RunDescription {
    teacher: ModelRef,
    #[serde(default = "main")]
    revision: String,
    vae: Option<ModelRef>,
    #[serde(skip)]
    folder: PathBuf,
}

fn main() -> String {
    Model::MAIN.to_owned()
}

impl RunDescription {
    /// `[s3]` of the run's configuration, or the environment's settings if it can't be read.
    fn s3(&self) -> S3Options {
        match Config::load(&self.folder.join("config.toml"), &[]) {
            Ok(config) => config.s3,
            Err(_) => environments_s3(),
        }
    }

    /// Fetches a model that the run was distilled from.
    fn fetch(
        &self,
        model: &ModelRef,
        only_vae: bool,
        fetch: impl Fn(&ModelRequest<'_>) -> Result<PathBuf, Failure>,
    ) -> Result<PathBuf, Failure> {
        let request = ModelRequest {
            model,
            revision: if only_vae {
                Model::MAIN
            } else {
                &self.revision
            },
            only_vae,
            s3: self.s3(),
        };
        // The model's name comes from run.json, not from the command line: exit code 1, not 2.
        fetch(&request).map_err(|failure| match failure {
            Failure::Usage(error) => Failure::Failed(
                format!(
                    "{}: {error}; give --teacher instead",
                    self.folder.join("run.json").display()
                )
                .into(),
            ),
            other => other,
        })
    }
}

/// Access to S3 as the environment says; a custom endpoint is addressed by path.
pub(super) fn environments_s3() -> S3Options {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    S3Options {
        path_style: set("AWS_ENDPOINT_URL") || set("AWS_ENDPOINT_URL_S3"),
        ..S3Options::default()
    }
}

impl PipelineFolders {
    /// Looks in `model`, then in `teacher` (with its revision); without `teacher`, in the teacher that the run names. `fetch` gives
    /// the local folder of a model.
    pub(super) fn find(
        model: &Path,
        teacher: Option<(&ModelRef, &str)>,
        unet: Option<&str>,
        fetch: impl Fn(&ModelRequest<'_>) -> Result<PathBuf, Failure>,
    ) -> Result<Self, Failure> {
        let unet = find_unet(model, unet)?;
        if teacher.is_none() && missing(model).is_empty() {
            return Ok(Self {
                unet,
                pipeline: model.to_owned(),
                vae: None,
            });
        }
        let run = find_run(model)?;
        let vae = match &run {
            Some(run) => run.vae.as_ref().map(|vae| run.fetch(vae, true, &fetch)),
            None => None,
        }
        .transpose()?;
        let pipeline = match (teacher, run) {
            (Some((model, revision)), run) => fetch(&ModelRequest {
                model,
                revision,
                only_vae: false,
                s3: run.map_or_else(environments_s3, |run| run.s3()),
            })?,
            (None, Some(run)) => run.fetch(&run.teacher, false, &fetch)?,
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
        Ok(Self {
            unet,
            pipeline,
            vae,
        })
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
                encoders.text_width(),
                String::new(),
            ),
            (
                "the number of latent channels",
                unet.in_channels,
                latents,
                further_inputs(unet.in_channels, latents),
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

fn find_unet(model: &Path, name: Option<&str>) -> Result<PathBuf, Failure> {
    let names = name.map_or_else(|| vec!["unet_target", "unet"], |name| vec![name]);
    match names
        .iter()
        .map(|name| model.join(name))
        .find(|folder| folder.is_dir())
    {
        Some(folder) => Ok(folder),
        None => failed(format!(
            "{} has no folder {}",
            model.display(),
            names.join(" or ")
        )),
    }
}

/// The run that a folder or its parent belongs to.
fn find_run(model: &Path) -> Result<Option<RunDescription>, Failure> {
    // Absolute, so that a relative "checkpoint-100" has a parent.
    let model = std::path::absolute(model)?;
    let Some(path) = model
        .ancestors()
        .take(2)
        .map(|folder| folder.join("run.json"))
        .find(|path| path.is_file())
    else {
        return Ok(None);
    };
    let text = bounded::read_file(&path, MAX_FILE_BYTES)?;
    match serde_json::from_slice::<RunDescription>(&text) {
        Ok(mut run) => {
            run.folder = path.parent().map(Path::to_owned).unwrap_or_default();
            Ok(Some(run))
        }
        Err(error) => failed(format!(
            "{}: {error}; give --teacher DIR instead",
            path.display()
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
        PipelineFolders::find(model, None, unet, |request| {
            assert_eq!(request.only_vae, request.model.as_str() == "elsewhere");
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
