//! The `coffey` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    coffey::cli::run()
}
