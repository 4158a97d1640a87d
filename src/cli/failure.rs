//! Failures of commands: their exit codes and their messages.

use std::sync::atomic::{AtomicBool, Ordering};

use coffey_pipeline::source::Details;

use crate::config::ConfigError;

/// Why a command did not finish its work, and with which exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the configuration is wrong.
    Usage(Box<dyn std::error::Error>),
    /// The work failed.
    Failed(Box<dyn std::error::Error>),
    /// A signal stopped the command, after it saved its state.
    Stopped,
}

impl Failure {
    pub(super) const STOPPED: &str = "stopped by a signal; run the same command to go on";

    /// The exit code.
    pub(super) fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Stopped => 143,
        }
    }

    /// Prints the failure, with its causes in full if the process is [verbose](be_verbose).
    pub(super) fn print(&self) {
        match self {
            Self::Usage(error) | Self::Failed(error) => {
                crate::print::say_always(&format!("error: {}", with_causes(error.as_ref())));
                print_details(error.as_ref());
            }
            Self::Stopped => errln!("{}", Self::STOPPED),
        }
    }
}

impl From<crate::models::PipelineMismatch> for Failure {
    fn from(error: crate::models::PipelineMismatch) -> Self {
        Self::Usage(error.into())
    }
}

impl From<crate::memory::MemoryError> for Failure {
    fn from(error: crate::memory::MemoryError) -> Self {
        Self::Usage(error.into())
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.into())
    }
}

impl From<coffey_pipeline::StreamError> for Failure {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        if error.is_config() {
            Self::Usage(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

impl From<coffey_pipeline::SourceError> for Failure {
    fn from(error: coffey_pipeline::SourceError) -> Self {
        coffey_pipeline::StreamError::from(error).into()
    }
}

impl From<crate::ranks::LanesError> for Failure {
    fn from(error: crate::ranks::LanesError) -> Self {
        Self::Usage(error.into())
    }
}

impl From<crate::ranks::RanksError> for Failure {
    fn from(error: crate::ranks::RanksError) -> Self {
        if error.is_config() {
            Self::Usage(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

impl From<crate::pretrained::PretrainedError> for Failure {
    fn from(error: crate::pretrained::PretrainedError) -> Self {
        if error.is_config() {
            Self::Usage(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

impl From<crate::hub::HubError> for Failure {
    fn from(error: crate::hub::HubError) -> Self {
        match error {
            crate::hub::HubError::Stopped => Self::Stopped,
            error if error.is_config() => Self::Usage(error.into()),
            error => Self::Failed(error.into()),
        }
    }
}

macro_rules! failed_from {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Failed(error.into())
            }
        })*
    };
}

failed_from!(
    std::io::Error,
    candle_core::Error,
    crate::models::ModelError,
    crate::encode::EncodeError,
    crate::diffusion::ScheduleError,
    crate::draw::SaveError,
);

/// Whether errors are followed by their causes in full.
static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Sets whether errors are followed by their causes in full.
pub(super) fn be_verbose(verbose: bool) {
    VERBOSE.store(verbose, Ordering::Relaxed);
}

/// Prints what `--verbose` adds to an error.
pub(super) fn print_details(error: &dyn std::error::Error) {
    if !VERBOSE.load(Ordering::Relaxed) {
        return;
    }
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    for details in causes.filter(|cause| cause.is::<Details>()) {
        errln!("causes: {details}");
    }
}

/// One readable message: the error, followed by every cause that its text does not contain.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !error.is::<Details>() && !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}
