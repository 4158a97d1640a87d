//! `coffey man`: the manual pages.

use std::path::PathBuf;

use clap::Args;
use clap_mangen::{Man, generate_to};

use super::Failure;
use super::output::check_local;

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
    check_local("--out", folder, "a local folder")?;
    let message = |what: String| format!("--out {}: {what}", folder.display()).into();
    if folder.is_file() {
        return Err(Failure::Usage(message(
            "it is a file; name a folder".to_owned(),
        )));
    }
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::Usage(message(format!("can't be created: {error}"))))?;
    generate_to(command, folder)
        .map_err(|error| Failure::Failed(message(format!("can't be written: {error}"))))?;
    outln!("{}", folder.display());
    Ok(())
}
