//! The Hugging Face Hub: its address and the user's token ([`Settings`]), and the upload of a finished run ([`Push`]).
//!
//! [`pretrained`](crate::pretrained) fetches models. This module never changes a run's weights. The token is sent in the
//! authorization header of requests to the Hub itself, and is never printed or written to a file.

mod card;
mod client;
mod files;
mod public;
mod push;
mod retry;
mod settings;

pub use card::Card;
pub use push::{Push, PushError, Pushed};
pub(crate) use retry::{AttemptError, MAX_ATTEMPTS, retry};
pub use settings::{HubToken, Settings, SettingsError};

use std::path::{Path, PathBuf};

use coffey_pipeline::counted;

/// Why a request to the Hub failed.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// An environment variable has an invalid value.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A push needs a token.
    #[error(
        "hub.push_to = \"{id}\": there is no token\n  set HF_TOKEN to one that may write there, or log in with `hf auth login`, or \
         leave hub.push_to out"
    )]
    NoToken {
        /// The repository.
        id: String,
    },
    /// A push is configured, and the environment forbids the network.
    #[error("hub.push_to = \"{id}\": HF_HUB_OFFLINE is set; unset it, or leave hub.push_to out")]
    Offline {
        /// The repository.
        id: String,
    },
    /// The Hub does not know the token.
    #[error(
        "{endpoint} does not accept the token (HTTP 401)\n  set HF_TOKEN to a valid one, or log in again with `hf auth login`"
    )]
    WrongToken {
        /// The Hub's address.
        endpoint: String,
    },
    /// The token lacks a permission.
    #[error(
        "{endpoint} does not let this token {what} (HTTP 403){message}\n  the token needs write access to {id}"
    )]
    Forbidden {
        /// The Hub's address.
        endpoint: String,
        /// The repository.
        id: String,
        /// The action.
        what: String,
        /// `: ` and the Hub's message, or empty.
        message: String,
    },
    /// An HTTP status that a retry won't change.
    #[error("can't {what}: HTTP {status}{message}")]
    Refused {
        /// The action.
        what: String,
        /// HTTP status.
        status: u16,
        /// `: ` and the server's message, or empty.
        message: String,
    },
    /// The repository was renamed.
    #[error("can't {what}: {id} has moved; set hub.push_to to its new name")]
    Moved {
        /// The action.
        what: String,
        /// The repository.
        id: String,
    },
    /// All attempts failed.
    #[error("can't {what} ({}): {cause}", counted(*attempts, "attempt"))]
    Unreachable {
        /// The action.
        what: String,
        /// Number of attempts.
        attempts: u32,
        /// The last failure.
        cause: String,
    },
    /// A response that does not follow the Hub's interface.
    #[error("can't {what}: the response does not follow the Hub's interface: {cause}")]
    InvalidResponse {
        /// The action.
        what: String,
        /// The fault.
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
    /// Whether the cause is in the configuration or the environment (exit code 2).
    pub fn is_config(&self) -> bool {
        matches!(
            self,
            Self::Settings(_) | Self::NoToken { .. } | Self::Offline { .. }
        )
    }
}

/// Adds the path to an I/O error.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Io { path, source }
}
