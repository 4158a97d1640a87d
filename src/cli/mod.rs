//! The command line: one file per subcommand, each thin over the library.
//!
//! Results go to standard output, messages for people to standard error. Exit codes: 0 done, 1 failed, 2 the command line or the
//! configuration is wrong, 143 stopped by a signal after saving.

mod bench;
mod check;
mod completions;
mod export;
mod failure;
mod init;
mod inspect;
mod job;
mod lora;
mod man;
mod numbers;
mod output;
mod pack;
mod precompute;
mod ranks;
mod resources;
mod run_description;
mod sample;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use coffey_pipeline::text::{escaped, message};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Config, ConfigError};
use crate::print;
pub(crate) use failure::Failure;
use failure::with_causes;

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 the command line or the configuration is wrong, 143 stopped by a signal.";

/// Streams captioned images out of S3 and distils a latent diffusion model into a Latent Consistency Model.
#[derive(Debug, Parser)]
#[command(name = "coffey", version, about, after_help = EXIT_CODES)]
struct Cli {
    /// After an error, print its causes in full, as the answer of each provider of credentials.
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Commands,
    /// Append all messages (progress, warnings, errors) with their times to this file too.
    #[arg(long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Commands {
    /// Distil; resumes by itself from the newest checkpoint.
    Train(train::TrainArgs),
    /// Encode image shards into latent shards.
    Precompute(precompute::PrecomputeArgs),
    /// Draw images with a student or a teacher.
    Sample(Box<sample::SampleArgs>),
    /// Write a LoRA in another layout, with a lower rank or merged into its base model's UNet.
    Export(export::ExportArgs),
    /// Make shards of a folder of images.
    Pack(pack::PackArgs),
    /// Describe shards: samples, sizes, missing or broken parts; shapes and statistics of latents.
    Inspect(inspect::InspectArgs),
    /// Dry run: configuration, credentials, first samples, models, memory plan, cost of a `precompute`.
    Check(check::CheckArgs),
    /// Run the data pipeline alone and name the stage that limits its speed.
    Bench(bench::BenchArgs),
    /// Write a commented configuration to begin with.
    Init(init::InitArgs),
    /// Print the completions of a shell.
    Completions(completions::CompletionsArgs),
    /// Print the manual page.
    Man(man::ManArgs),
}

/// The configuration file and its overrides.
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

/// Parses the command line, runs the command and returns the process's exit code.
pub fn run() -> ExitCode {
    print_panics();
    let done = match Cli::try_parse() {
        Ok(cli) => cli.run(),
        Err(error) if error.use_stderr() => {
            print_usage(&error);
            return ExitCode::from(2);
        }
        // Help and version come as an error.
        Err(help) => {
            print::note_output(help.print());
            Ok(())
        }
    };
    let written = print::finish_output()
        .map_err(|error| Failure::Failed(format!("standard output: {error}").into()));
    let Err(failure) = done.and(written) else {
        return ExitCode::SUCCESS;
    };
    failure.print();
    ExitCode::from(failure.code())
}

impl Cli {
    fn run(self) -> Result<(), Failure> {
        if let Some(file) = &self.log_file {
            print::log_to(file).map_err(|error| {
                let message = format!("--log-file {} can't be opened: {error}", file.display());
                Failure::Usage(message.into())
            })?;
            print::log(concat!("coffey ", env!("CARGO_PKG_VERSION")));
        }
        failure::be_verbose(self.verbose);
        show_warnings();
        match self.command {
            Commands::Train(args) => train::run(args),
            Commands::Precompute(args) => precompute::run(args),
            Commands::Sample(args) => sample::run(*args),
            Commands::Export(args) => export::run(args),
            Commands::Pack(args) => pack::run(args),
            Commands::Inspect(args) => inspect::run(args),
            Commands::Check(args) => check::run(args),
            Commands::Bench(args) => bench::run(args),
            Commands::Init(args) => init::run(&args),
            Commands::Completions(args) => {
                completions::run(&args, Self::command());
                Ok(())
            }
            Commands::Man(args) => man::run(&args, Self::command()),
        }
    }
}

/// Prints the warnings of the stream, such as a truncated shard.
fn show_warnings() {
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .with_writer(|| print::Events)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .finish()
        // Libraries warn of faults with a dump of their structures; the error that follows has their causes.
        .with(
            Targets::new()
                .with_target("coffey", LevelFilter::WARN)
                .with_target("aws_runtime::env_config", LevelFilter::WARN),
        )
        .init();
}

/// Prints clap's message on a wrong command line, with the arguments in a printable form.
fn print_usage(error: &clap::Error) {
    let printable = std::env::args_os();
    let printable = printable.map(|argument| escaped(&argument.to_string_lossy()).into_owned());
    let again = Cli::try_parse_from(printable).err();
    let text = again.as_ref().unwrap_or(error).render().to_string();
    errln!("{}", text.trim_end());
}

/// Prints a panic as any message where the default form would show a secret or control the terminal.
fn print_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let shown = panic.to_string();
        if message(&shown) == shown {
            default(panic);
        } else {
            errln!("{shown}");
        }
    }));
}
