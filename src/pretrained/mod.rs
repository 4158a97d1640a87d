//! Pretrained models: turns a model's name (a folder, an S3 prefix, a Hub id) into a local folder.
//!
//! A folder is used in place. Other models are fetched into a cache: only the required files ([`Components`]), each written
//! atomically, and only those that the cache lacks. A lock makes processes that need the same model wait for each other. This
//! module never reads the weights; the loaders check them. If files are missing, it says what the folder is instead.

mod cache;
mod files;
mod hub;
mod kind;
mod progress;
mod s3;

pub use files::Components;
use files::INDEX;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use coffey_pipeline::{SourceError, Sources, counted, json};
use tokio::runtime::Handle;

use crate::config::{self, ModelPlace, ModelRef, ModelRefError};
use crate::hub::SettingsError;
use crate::models::{TextParts, tensor_names};

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum PretrainedError {
    /// The name is not a model's name.
    #[error("{model}: {source}")]
    Name {
        /// The model's name in the configuration.
        model: String,
        /// The cause.
        source: ModelRefError,
    },
    /// An environment variable has an invalid value.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// There is no folder for the cache.
    #[error("there is no home folder to keep models in; set HOME, or {set}")]
    NoHome {
        /// The variable to set.
        set: &'static str,
    },
    /// The Hub requires a token.
    #[error(
        "{id}: {endpoint} requires a token (HTTP {status}): the model is private or gated, or does not exist (and there is no \
         folder of that name)\n  check the name; if it is gated, accept its licence at {endpoint}/{id}; then set HF_TOKEN"
    )]
    NoToken {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// HTTP status.
        status: u16,
    },
    /// The Hub does not accept the token.
    #[error(
        "{id}: {endpoint} refuses this token (HTTP {status})\n  if the model is gated, accept its licence at {endpoint}/{id}; else \
         set HF_TOKEN to a valid token with read access to the model"
    )]
    WrongToken {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// HTTP status.
        status: u16,
    },
    /// The Hub has no such model.
    #[error(
        "{id}: no such model at {endpoint} (HTTP 404), and no folder of that name\n  check the name, and HF_TOKEN if it is private"
    )]
    NoModel {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
    },
    /// The model has no such revision.
    #[error(
        "{id}: no revision \"{revision}\" at {endpoint}\n  name one of its branches, tags or commits"
    )]
    NoRevision {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// The Hub's address.
        endpoint: String,
    },
    /// The Hub can't be reached.
    #[error(
        "{id}: there is no folder of that name here, and the Hub's model can't be fetched from {endpoint} ({}): {cause}\n  \
         check the name, or the network and HF_ENDPOINT",
        counted(*attempts, "attempt")
    )]
    Unreachable {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// Number of attempts.
        attempts: u32,
        /// The last failure.
        cause: String,
    },
    /// The Hub stopped answering.
    #[error(
        "{id}: {endpoint} sent nothing for {seconds} s during the download of {what} (there is no folder of that name here)\n  run the command \
         again to resume the download"
    )]
    Stalled {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// Length of the wait.
        seconds: u64,
        /// A file, or the list of files.
        what: String,
    },
    /// The Hub's answer is an error that a retry won't change.
    #[error("{id}: {endpoint} refuses {what}: {cause}")]
    Refused {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// A file, or the list of files.
        what: String,
        /// The answer.
        cause: String,
    },
    /// The environment forbids the network, and the cache lacks files of the model.
    #[error("{id}: there is no folder of that name here, HF_HUB_OFFLINE is set, and {} lacks files of the model at revision \"{revision}\"\n  check the name, or unset HF_HUB_OFFLINE", cache.display())]
    Offline {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// The Hub's cache.
        cache: PathBuf,
    },
    /// The folder, prefix or repository lacks files of a model.
    #[error("{model}: {lacks}; it must be a model in diffusers layout")]
    NotAModel {
        /// The model's name in the configuration.
        model: String,
        /// The missing files.
        lacks: String,
    },
    /// The name stands for something else than a model in diffusers layout.
    #[error("{model} {what}")]
    OtherKind {
        /// The model's name in the configuration.
        model: String,
        /// What it is, and what to give instead.
        what: String,
    },
    /// A downloaded file has another checksum than the Hub's.
    #[error("{model}: {file} arrived damaged: {cause}")]
    Damaged {
        /// The model's name in the configuration.
        model: String,
        /// The file.
        file: String,
        /// The difference.
        cause: String,
    },
    /// S3 failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A file of the cache can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

impl PretrainedError {
    /// Whether the cause is in the configuration or the environment (exit code 2).
    pub fn is_config(&self) -> bool {
        match self {
            Self::Name { .. }
            | Self::Settings(_)
            | Self::NoHome { .. }
            | Self::OtherKind { .. } => true,
            Self::Source(error) => error.is_config(),
            _ => false,
        }
    }
}

/// Adds the path to an I/O error.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> PretrainedError {
    let path = path.to_owned();
    move |source| PretrainedError::Io { path, source }
}

/// A model in a local folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its folder.
    pub folder: PathBuf,
    /// The commit, for a model from the Hub.
    pub commit: Option<String>,
}

/// Makes a model available in a local folder.
///
/// `revision` applies to a Hub id only. Of a folder it is checked that the files are there. Blocks; must not be called on a thread of the
/// runtime.
///
/// # Errors
/// [`PretrainedError`] when the model does not exist, can't be fetched, or lacks one of `components`.
pub fn fetch(
    model: &ModelRef,
    revision: &str,
    components: &Components,
    sources: &Sources,
    runtime: &Handle,
) -> Result<Fetched, PretrainedError> {
    let place = model.place().map_err(|source| PretrainedError::Name {
        model: model.to_string(),
        source,
    })?;
    match place {
        ModelPlace::File(path) => Err(PretrainedError::OtherKind {
            model: model.to_string(),
            what: kind::describe_file(&path, &tensor_names(&path)),
        }),
        ModelPlace::Folder(folder) => {
            let read = |file: &str| read_json(&folder.join(file));
            let files = files::listing(&folder);
            plan(model.as_str(), components, &files, &read)?;
            Ok(Fetched {
                folder,
                commit: None,
            })
        }
        ModelPlace::S3(prefix) => Ok(Fetched {
            folder: s3::fetch(&prefix, components, sources, runtime)?,
            commit: None,
        }),
        ModelPlace::Hub(id) => hub::HubClient::from_env()?.fetch(&id, revision, components),
    }
}

/// Chooses the files of a model out of `files`; `json` reads one of them, if it can be read before it is chosen.
fn plan(
    model: &str,
    components: &Components,
    files: &BTreeSet<String>,
    json: &dyn Fn(&str) -> Option<serde_json::Value>,
) -> Result<files::FetchPlan, PretrainedError> {
    let place = kind::Place {
        name: model,
        files,
        json,
    };
    let other_kind = |what| PretrainedError::OtherKind {
        model: model.to_owned(),
        what,
    };
    if let Some(what) = kind::other_family(&place).filter(|_| components.is_pipeline()) {
        return Err(other_kind(what));
    }
    let index = files.contains(INDEX).then(|| json(INDEX)).flatten();
    let components = components.clone().of_index(index.as_ref());
    files::plan(&components, files).map_err(|lacks| {
        let is_run = components.are_in_runs() && place.has_folder("unet");
        let what = if is_run { None } else { kind::describe(&place) };
        what.map_or_else(
            || PretrainedError::NotAModel {
                model: model.to_owned(),
                lacks,
            },
            other_kind,
        )
    })
}

fn read_json(path: &Path) -> Option<serde_json::Value> {
    json::from_slice(&bounded::read_file(path, MAX_FILE_BYTES).ok()?).ok()
}

/// [`fetch`] for a VAE that is a model by itself or the subfolder `vae` of a model; returns the VAE's folder.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_vae(
    model: &ModelRef,
    sources: &Sources,
    runtime: &Handle,
) -> Result<PathBuf, PretrainedError> {
    let main = config::Model::MAIN;
    let folder = fetch(model, main, &Components::vae(), sources, runtime)?.folder;
    let subfolder = folder.join("vae");
    let is_model = |folder: &Path| folder.join("config.json").is_file();
    if !is_model(&folder) && is_model(&subfolder) {
        Ok(subfolder)
    } else {
        Ok(folder)
    }
}

/// Local folders of a run's models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Models {
    /// The teacher's folder.
    pub pipeline: PathBuf,
    /// The folder of `model.vae`, where it is set.
    pub vae: Option<PathBuf>,
    /// The teacher's commit, if it comes from the Hub.
    pub commit: Option<String>,
}

impl Models {
    /// Whether the teacher is SDXL, with two text encoders.
    pub fn are_sdxl(&self) -> bool {
        TextParts::of(&self.pipeline).second.is_some()
    }

    /// Fetches `teacher` and `model.vae`. `components` makes the list for the teacher; its argument is whether the teacher's own VAE
    /// is needed.
    ///
    /// # Errors
    /// As [`fetch`].
    pub fn fetch(
        config: &config::Model,
        teacher: &ModelRef,
        components: impl FnOnce(bool) -> Components,
        sources: &Sources,
        runtime: &Handle,
    ) -> Result<Self, PretrainedError> {
        let components = components(config.vae.is_none());
        let teacher = fetch(teacher, &config.revision, &components, sources, runtime)?;
        let vae = config.vae.as_ref();
        Ok(Self {
            pipeline: teacher.folder,
            vae: vae
                .map(|vae| fetch_vae(vae, sources, runtime))
                .transpose()?,
            commit: teacher.commit,
        })
    }
}
