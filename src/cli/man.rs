//! `coffey man`: the manual pages.

use std::path::PathBuf;

use clap::Args;
use clap_mangen::{Man, generate_to};

use super::Failure;

/// Options of `coffey man`.
#[derive(Args, Debug)]
pub(super) struct ManArgs {
    /// Write the pages of coffey and of each command to this folder, as coffey.1, coffey-train.1, …
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// Runs `coffey man`.
pub(super) fn run(args: &ManArgs, command: clap::Command) -> Result<(), Failure> {
    let Some(folder) = &args.out else {
        let mut page = Vec::new();
        Man::new(command).render(&mut page)?;
        out!("{}", String::from_utf8_lossy(&page));
        return Ok(());
    };
    let written = std::fs::create_dir_all(folder).and_then(|()| generate_to(command, folder));
    written.map_err(|error| {
        Failure::Failed(format!("--out {}: can't be written: {error}", folder.display()).into())
    })?;
    outln!("{}", folder.display());
    Ok(())
}
