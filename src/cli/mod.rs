//! The command line: one file a subcommand, each thin over the library.
//!
//! Results go to standard output, everything said to a person to standard error. Exit codes: 0 done, 1 failed, 2 the command
//! line or the configuration is wrong, 143 stopped by a signal after saving.

mod bench;
mod check;
mod data;
mod device;
mod inspect;
mod precompute;
mod ranks;
mod sample;
mod train;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigError};
use crate::process;

/// Streams captioned images out of S3 and distils a latent diffusion model into a Latent Consistency Model.
#[derive(Debug, Parser)]
#[command(name = "coffey", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Distil; resumes by itself from the newest checkpoint.
    Train(train::TrainArgs),
    /// Image shards in, latent shards out, nothing else.
    Precompute(precompute::PrecomputeArgs),
    /// Draw images with a student or a teacher.
    Sample(sample::SampleArgs),
    /// Say what is in shards: samples, sizes, missing or broken parts; of latents shapes and statistics.
    Inspect(inspect::InspectArgs),
    /// Dry run: configuration, credentials, first shard, models, memory plan, cost of a `precompute`.
    Check(check::CheckArgs),
    /// Run the data pipeline alone and say which stage is the limit.
    Bench(bench::BenchArgs),
}

/// The configuration file and what is laid over it.
#[derive(Args, Clone, Debug)]
struct ConfigArgs {
    /// Configuration file (TOML).
    #[arg(short, long, value_name = "FILE")]
    config: PathBuf,
    /// Override one key, as `train.max_steps=10` (TOML value syntax; a bare word is a string).
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl ConfigArgs {
    fn load(&self) -> Result<Config, ConfigError> {
        Config::load(&self.config, &self.set)
    }
}

/// How a command ended without doing what it was asked to.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the configuration is wrong.
    Usage(Box<dyn std::error::Error>),
    /// The work failed.
    Failed(Box<dyn std::error::Error>),
    /// A signal stopped it; what there was is saved.
    Stopped,
}

impl From<crate::models::PipelineMismatch> for Failure {
    fn from(error: crate::models::PipelineMismatch) -> Self {
        Self::Usage(error.into())
    }
}

impl Failure {
    const STOPPED: &str = "stopped by a signal; run the same command to go on";

    fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Stopped => 143,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.into())
    }
}

impl From<coffey_pipeline::StreamError> for Failure {
    fn from(error: coffey_pipeline::StreamError) -> Self {
        match error.is_config() {
            true => Self::Usage(error.into()),
            false => Self::Failed(error.into()),
        }
    }
}

impl From<coffey_pipeline::SourceError> for Failure {
    fn from(error: coffey_pipeline::SourceError) -> Self {
        coffey_pipeline::StreamError::from(error).into()
    }
}

impl From<crate::pretrained::PretrainedError> for Failure {
    fn from(error: crate::pretrained::PretrainedError) -> Self {
        match error.is_config() {
            true => Self::Usage(error.into()),
            false => Self::Failed(error.into()),
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

/// Parses the command line, runs the command and returns the process's exit code.
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors; clap's own codes are 0 and 2.
        Err(error) => {
            let _unprintable = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    // The stream's warnings, as a shard that is cut off.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let result = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Precompute(args) => precompute::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Check(args) => check::run(args),
        Command::Bench(args) => bench::run(args),
    };
    let Err(failure) = result else {
        return ExitCode::SUCCESS;
    };
    match &failure {
        Failure::Usage(error) | Failure::Failed(error) => {
            errln!("error: {}", with_causes(error.as_ref()))
        }
        Failure::Stopped => errln!("{}", Failure::STOPPED),
    }
    ExitCode::from(failure.code())
}

/// One readable message: the error and those causes that it does not already state.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}
