//! Where pretrained models come from: turns a model's name (a folder, an S3 prefix, a Hub id) into a local folder.
//!
//! A folder is used where it is. Anything else is fetched into a cache, only the files that are needed ([`Wanted`]), each whole
//! or not there, and what is there already is not fetched again. Processes that want the same model at once wait for one
//! another. Nothing here knows what is in the files; whether they make a model, the loaders say.

mod cache;
mod files;
mod hub;
mod progress;
mod s3;

pub use files::Wanted;

use std::path::{Path, PathBuf};

use coffey_pipeline::{SourceError, Sources};
use tokio::runtime::Handle;

use crate::config::{self, ModelPlace, ModelRef, ModelRefError};
use crate::hub::SettingsError;

/// Why a model could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PretrainedError {
    /// The name stands for no model.
    #[error("{model}: {source}")]
    Name {
        /// As it was written.
        model: String,
        /// What is wrong with it.
        source: ModelRefError,
    },
    /// An environment variable says something that can't be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// There is no folder to keep what is fetched in.
    #[error("there is no home folder to keep models in; set HOME, or {set}")]
    NoHome {
        /// The variable to set.
        set: &'static str,
    },
    /// The Hub asks for a token.
    #[error(
        "{id}: {endpoint} gives it to nobody without a token (HTTP {status}): the model is private or gated, or there is none \
         of that name (nor a folder). Check the name; if it is gated, accept its licence at {endpoint}/{id}; then set HF_TOKEN"
    )]
    NoToken {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// What it answered.
        status: u16,
    },
    /// The Hub does not accept the token.
    #[error(
        "{id}: {endpoint} refuses it with this token (HTTP {status}): if the model is gated, accept its licence at \
         {endpoint}/{id}; else set HF_TOKEN to a token that is valid and may read it"
    )]
    WrongToken {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// What it answered.
        status: u16,
    },
    /// The Hub knows no such model.
    #[error(
        "{id}: no such model at {endpoint} (HTTP 404), and no folder of that name; check the name, and HF_TOKEN if it is private"
    )]
    NoModel {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
    },
    /// The model has no such revision.
    #[error(
        "{id}: has no revision \"{revision}\" at {endpoint}; name one of its branches, tags or commits"
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
        "{id}: can't fetch it from {endpoint} ({attempts} attempts): {cause}; check the network and HF_ENDPOINT"
    )]
    Unreachable {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        cause: String,
    },
    /// The Hub stopped answering.
    #[error(
        "{id}: {endpoint} sent nothing for {seconds} s while {what} was fetched; the same command goes on from there"
    )]
    Stalled {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// How long it was waited for.
        seconds: u64,
        /// A file, or the list of files.
        what: String,
    },
    /// The Hub answers with something that repeating won't change.
    #[error("{id}: {endpoint} refuses {what}: {cause}")]
    Refused {
        /// The model.
        id: String,
        /// The Hub's address.
        endpoint: String,
        /// A file, or the list of files.
        what: String,
        /// What it said.
        cause: String,
    },
    /// Asked not to go to the network, and the cache lacks something.
    #[error("{id}: HF_HUB_OFFLINE is set and {} does not hold all of it at revision \"{revision}\"", cache.display())]
    Offline {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// The Hub's cache.
        cache: PathBuf,
    },
    /// The place is there, and is not a model with what is needed.
    #[error("{model}: {lacks}; needed is a model in diffusers layout")]
    NotAModel {
        /// As it was written.
        model: String,
        /// What it lacks.
        lacks: String,
    },
    /// What came is not what was promised.
    #[error("{model}: {file} arrived damaged: {cause}")]
    Damaged {
        /// As it was written.
        model: String,
        /// The file.
        file: String,
        /// How it can be told.
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
    /// Whether the configuration or the environment is at fault, as can be told without asking a server.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Name { .. } | Self::Settings(_) | Self::NoHome { .. } => true,
            Self::Source(error) => error.is_config(),
            _ => false,
        }
    }
}

/// Adds the path to an i/o error.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> PretrainedError {
    let path = path.to_owned();
    move |source| PretrainedError::Io { path, source }
}

/// A model that is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its folder.
    pub folder: PathBuf,
    /// The commit of a model of the Hub.
    pub commit: Option<String>,
}

/// Makes a model available in a local folder.
///
/// `revision` counts for a Hub id only. A folder is handed out as it is, whatever is in it. Blocks; must not be called on
/// the runtime's own threads.
///
/// # Errors
/// [`PretrainedError`] when there is no such model, or it lacks something that is wanted.
pub fn fetch(
    model: &ModelRef,
    revision: &str,
    wanted: &Wanted,
    sources: &Sources,
    runtime: &Handle,
) -> Result<Fetched, PretrainedError> {
    let place = model.place().map_err(|source| PretrainedError::Name {
        model: model.to_string(),
        source,
    })?;
    match place {
        ModelPlace::Folder(folder) => Ok(Fetched {
            folder,
            commit: None,
        }),
        ModelPlace::S3(prefix) => Ok(Fetched {
            folder: s3::fetch(&prefix, wanted, sources, runtime)?,
            commit: None,
        }),
        ModelPlace::Hub(id) => hub::Hub::from_env()?.fetch(&id, revision, wanted),
    }
}

/// [`fetch`] for an autoencoder that is a model by itself or the subfolder `vae` of one; the folder is the autoencoder's.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_vae(
    model: &ModelRef,
    sources: &Sources,
    runtime: &Handle,
) -> Result<PathBuf, PretrainedError> {
    let main = config::Model::MAIN;
    let folder = fetch(model, main, &Wanted::vae(), sources, runtime)?.folder;
    let below = folder.join("vae");
    let is_model = |folder: &Path| folder.join("config.json").is_file();
    match !is_model(&folder) && is_model(&below) {
        true => Ok(below),
        false => Ok(folder),
    }
}

/// The models of a run, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Models {
    /// The teacher's folder.
    pub pipeline: PathBuf,
    /// The folder of another VAE than the teacher's.
    pub vae: Option<PathBuf>,
    /// The teacher's commit, if it comes from the Hub.
    pub commit: Option<String>,
}

impl Models {
    /// Fetches `teacher` and the VAE of the configuration; `wanted` is told whether the teacher's own VAE is needed.
    ///
    /// # Errors
    /// As [`fetch`].
    pub fn fetch(
        config: &config::Model,
        teacher: &ModelRef,
        wanted: impl FnOnce(bool) -> Wanted,
        sources: &Sources,
        runtime: &Handle,
    ) -> Result<Self, PretrainedError> {
        let wanted = wanted(config.vae.is_none());
        let teacher = fetch(teacher, &config.revision, &wanted, sources, runtime)?;
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
