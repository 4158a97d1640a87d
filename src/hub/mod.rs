//! The Hugging Face Hub: where it is and who we are there ([`Settings`]), and the upload of a finished run ([`Push`]).
//!
//! Fetching models is [`pretrained`](crate::pretrained)'s. Nothing here changes a run's weights, and the token leaves this
//! module in one header of requests to the Hub itself, in nothing that is said or written.

mod card;
mod client;
mod files;
mod public;
mod push;
mod settings;

pub use card::Card;
pub use push::{Push, PushError, Pushed};
pub use settings::{Settings, SettingsError, Token};

use std::path::{Path, PathBuf};

/// Why the Hub did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The environment says something that can't be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Nobody may write without a token.
    #[error(
        "hub.push_to = \"{id}\": there is no token; set HF_TOKEN to one that may write there, or log in with `hf auth login`, or \
         leave hub.push_to out"
    )]
    NoToken {
        /// The repository.
        id: String,
    },
    /// Asked to push and not to go to the network.
    #[error("hub.push_to = \"{id}\": HF_HUB_OFFLINE is set; unset it, or leave hub.push_to out")]
    Offline {
        /// The repository.
        id: String,
    },
    /// The token is not known.
    #[error(
        "{endpoint} does not accept the token (HTTP 401); set HF_TOKEN to a valid one, or log in anew with `hf auth login`"
    )]
    WrongToken {
        /// The Hub's address.
        endpoint: String,
    },
    /// The token may not do this.
    #[error(
        "{endpoint} does not let this token {what} (HTTP 403){said}; it has to be one with write access to {id}"
    )]
    Forbidden {
        /// The Hub's address.
        endpoint: String,
        /// The repository.
        id: String,
        /// What was asked for.
        what: String,
        /// The Hub's own words, after a colon, or nothing.
        said: String,
    },
    /// An answer that repeating won't change.
    #[error("can't {what}: HTTP {status}{said}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The answer.
        status: u16,
        /// The server's own words, after a colon, or nothing.
        said: String,
    },
    /// The repository has another name now.
    #[error("can't {what}: {id} has moved; set hub.push_to to the name it has now")]
    Moved {
        /// What was asked for.
        what: String,
        /// The repository.
        id: String,
    },
    /// Failures that might have passed, and did not.
    #[error("can't {what} ({attempts} attempts): {cause}")]
    Unreachable {
        /// What was asked for.
        what: String,
        /// How often it was tried.
        attempts: u32,
        /// The last failure.
        cause: String,
    },
    /// An answer that can't be understood.
    #[error("can't {what}: the answer is not what the Hub's interface promises: {cause}")]
    Answer {
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A file of the run can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A stop was asked for.
    #[error("stopped")]
    Stopped,
}

impl HubError {
    /// Whether the configuration or the environment is at fault, as can be told without asking a server.
    pub fn is_config(&self) -> bool {
        matches!(
            self,
            Self::Settings(_) | Self::NoToken { .. } | Self::Offline { .. }
        )
    }
}

/// Adds the path to an i/o error.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Io { path, source }
}
