//! `run.json`: where the models are that a run was distilled from.

use std::path::{Path, PathBuf};

use coffey_pipeline::S3Options;
use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};

use super::Failure;
use crate::config::{Config, Model, ModelRef, ObjectiveKind, TCD_GAMMA};
use crate::sample::SampleScheduler;

/// A model that is needed in a local folder.
#[derive(Debug)]
pub(super) struct ModelRequest<'a> {
    /// The model.
    pub(super) model: &'a ModelRef,
    /// Revision, if the model is on the Hub.
    pub(super) revision: &'a str,
    /// The part that is needed.
    pub(super) part: Part,
    /// Access to S3.
    pub(super) s3: S3Options,
}

/// Access to S3 as the environment says; a custom endpoint is addressed by path.
pub(super) fn environments_s3() -> S3Options {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    S3Options {
        path_style: set("AWS_ENDPOINT_URL") || set("AWS_ENDPOINT_URL_S3"),
        ..S3Options::default()
    }
}

/// `run.json`, which `coffey train` writes into the folder of a run.
#[derive(serde::Deserialize)]
pub(super) struct RunDescription {
    teacher: ModelRef,
    #[serde(default = "main")]
    revision: String,
    vae: Option<ModelRef>,
    #[serde(default)]
    objective: ObjectiveKind,
    tcd_gamma: Option<f64>,
    /// The working directory of the run's last start; absent in runs of earlier versions.
    started_in: Option<PathBuf>,
    #[serde(skip)]
    folder: PathBuf,
}

fn main() -> String {
    Model::MAIN.to_owned()
}

/// The part of a model that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// A pipeline without its UNet.
    Surroundings,
    /// A pipeline.
    Pipeline,
    /// The UNet of a pipeline.
    Unet,
    /// An autoencoder.
    Vae,
}

impl Part {
    /// How the user names another place of the model.
    fn remedy(self) -> &'static str {
        match self {
            Self::Surroundings | Self::Pipeline => "give --teacher MODEL",
            Self::Unet => "give it as MODEL, and the LoRA with --lora",
            Self::Vae => "give --vae MODEL",
        }
    }
}

impl RunDescription {
    /// The run that a folder or its parent belongs to.
    pub(super) fn find(model: &Path) -> Result<Option<Self>, Failure> {
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
        let text = bounded::read_text_file(&path, MAX_FILE_BYTES)?;
        match serde_json::from_str::<Self>(&text) {
            Ok(mut run) => {
                run.folder = path.parent().map(Path::to_owned).unwrap_or_default();
                Ok(Some(run))
            }
            Err(error) => Err(Failure::Failed(
                format!("{}: {error}; give --teacher DIR instead", path.display()).into(),
            )),
        }
    }

    /// Sampler of the run's student.
    pub(super) fn scheduler(&self) -> SampleScheduler {
        match self.objective {
            ObjectiveKind::Lcm => SampleScheduler::Lcm,
            ObjectiveKind::Tcd => SampleScheduler::Tcd {
                gamma: self.tcd_gamma.unwrap_or(TCD_GAMMA),
            },
            ObjectiveKind::Pcm => SampleScheduler::Ddim,
        }
    }

    /// Whether the run had another autoencoder than the teacher's.
    pub(super) fn has_vae(&self) -> bool {
        self.vae.is_some()
    }

    /// `[s3]` of the run's configuration, or the environment's settings if it can't be read.
    pub(super) fn s3(&self) -> S3Options {
        let Ok(config) = Config::load(&self.folder.join("config.toml"), &[]) else {
            return environments_s3();
        };
        let root = config.s3.embedded_root.as_deref();
        S3Options {
            embedded_root: root.map(|root| self.local(root).unwrap_or_else(|| root.to_owned())),
            ..config.s3
        }
    }

    /// A folder of this name where the run was started.
    fn local(&self, name: &Path) -> Option<PathBuf> {
        let folder = self.started_in.as_ref()?.join(name);
        folder.is_dir().then_some(folder)
    }

    /// Fetches a model that the run was distilled from. A relative name is that of a folder where the run was started, else it is read as
    /// on the command line.
    pub(super) fn fetch(
        &self,
        part: Part,
        fetch: impl Fn(&ModelRequest<'_>) -> Result<PathBuf, Failure>,
    ) -> Result<PathBuf, Failure> {
        let (name, revision) = match (part, &self.vae) {
            (Part::Vae, Some(vae)) => (vae, Model::MAIN),
            _ => (&self.teacher, self.revision.as_str()),
        };
        let local = self.local(Path::new(name.as_str()));
        let local = local.map(|folder| ModelRef::from(folder.to_string_lossy().into_owned()));
        let request = ModelRequest {
            model: local.as_ref().unwrap_or(name),
            revision,
            part,
            s3: self.s3(),
        };
        fetch(&request).map_err(|failure| match failure {
            // The name comes from run.json, not from the command line: exit code 1, not 2.
            Failure::Usage(error) | Failure::Failed(error) => {
                let mut message = format!("{}: {error}", self.folder.join("run.json").display());
                if local.is_none() && !name.as_str().starts_with("s3://") {
                    message += &self.looked_for(name);
                }
                message += &format!("; if it is elsewhere, {}", part.remedy());
                Failure::Failed(message.into())
            }
            Failure::Stopped => Failure::Stopped,
        })
    }

    /// The folder that a relative name was looked for as, as a part of a message.
    fn looked_for(&self, name: &ModelRef) -> String {
        match &self.started_in {
            Some(start) if Path::new(name.as_str()).is_relative() => {
                let folder = start.join(name.as_str());
                format!(", and no folder {}", folder.display())
            }
            _ => String::new(),
        }
    }
}
