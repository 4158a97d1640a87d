//! `coffey completions`: the script with which a shell completes command lines.

use clap::Args;
use clap_complete::{Shell, generate};

/// Options of `coffey completions`.
#[derive(Args, Debug)]
pub(super) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Runs `coffey completions`.
pub(super) fn run(args: &CompletionsArgs, mut command: clap::Command) {
    let (name, mut script) = (command.get_name().to_owned(), Vec::new());
    generate(args.shell, &mut command, name, &mut script);
    out!("{}", String::from_utf8_lossy(&script));
}
