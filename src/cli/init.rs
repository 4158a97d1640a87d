//! `coffey init`: a commented configuration to begin with.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use super::Failure;
use super::output::check_local;

/// A kind of configuration: a file of `configs/`.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    text: &'static str,
}

macro_rules! kinds {
    ($($name:literal),* $(,)?) => {
        [$(Kind { name: $name, text: include_str!(concat!("../../configs/", $name, ".toml")) }),*]
    };
}

/// All files of `configs/`.
static KINDS: [Kind; 10] = kinds![
    "quickstart",
    "quickstart-long",
    "quickstart-lora",
    "sd15-laion",
    "sd15-lora",
    "sdxl",
    "sdxl-lora",
    "train-from-latents",
    "precompute-quickstart",
    "precompute-sd15",
];

impl Kind {
    /// The first line of the file, a comment.
    fn description(self) -> &'static str {
        let line = self.text.lines().next().unwrap_or_default();
        line.trim_start_matches("# ").trim_end_matches('.')
    }

    fn parser() -> impl TypedValueParser<Value = Self> {
        let value = |kind: &Self| PossibleValue::new(kind.name).help(kind.description());
        let parser = PossibleValuesParser::new(KINDS.iter().map(value));
        parser.try_map(|name| {
            let kind = KINDS.into_iter().find(|kind| kind.name == name);
            kind.ok_or("no such kind")
        })
    }

    /// The tables of the file. A configuration for a GPU does not load in a binary without CUDA.
    fn tables(self) -> toml::Table {
        self.text.parse().unwrap_or_default()
    }

    /// The commands that read the written `file`.
    fn commands(self, file: &Path) -> [String; 2] {
        let command = match self.tables().contains_key("latents") {
            true => "precompute",
            false => "train",
        };
        let file = file.display();
        ["check", command].map(|command| format!("coffey {command} -c {file}"))
    }

    /// The folder that the embedded S3 server needs.
    fn embedded_root(self) -> Option<PathBuf> {
        let tables = self.tables();
        let root = tables.get("s3")?.get("embedded_root")?.as_str()?;
        Some(root.into())
    }
}

/// Options of `coffey init`.
#[derive(Args, Debug)]
pub(super) struct InitArgs {
    /// Kind of configuration.
    #[arg(value_name = "KIND", value_parser = Kind::parser())]
    kind: Option<Kind>,
    /// The file to write, with its folder; - is standard output.
    #[arg(short, long, value_name = "FILE", default_value = "coffey.toml")]
    out: PathBuf,
    /// Overwrite the file if it is there.
    #[arg(short, long)]
    force: bool,
}

/// Runs `coffey init`.
pub(super) fn run(args: &InitArgs) -> Result<(), Failure> {
    let kind = args.kind.ok_or_else(|| Failure::Usage(list().into()))?;
    let to_stdout = args.out.as_os_str() == "-";
    let file = match to_stdout {
        true => Path::new("coffey.toml"),
        false => &args.out,
    };
    let [check, work] = kind.commands(file);
    let Kind { name, text } = kind;
    let text = format!(
        "# From `coffey init {name}`. Edit it, then run `{check}` and `{work}`.\n# docs/configuration.md has every key.\n\n{text}"
    );
    if to_stdout {
        out!("{text}");
    } else {
        write(file, &text, args.force)?;
        outln!("{}", file.display());
        errln!("next: edit it, then run `{check}` and `{work}`");
    }
    if let Some(root) = kind.embedded_root()
        && !root.exists()
    {
        let root = root.display();
        errln!(
            "warning: there is no folder {root} here: run it in a checkout of coffey, or in /opt/coffey of its container image"
        );
    }
    Ok(())
}

/// The message without a kind.
fn list() -> String {
    let lines = KINDS.map(|kind| format!("\n  {:<22} {}", kind.name, kind.description()));
    format!("coffey init needs a kind:{}", lines.concat())
}

fn write(file: &Path, text: &str, force: bool) -> Result<(), Failure> {
    check_local("--out", file, "a local file")?;
    let wrong =
        |message: String| Failure::Usage(format!("--out {}: {message}", file.display()).into());
    if file.is_dir() {
        return Err(wrong("it is a folder; name a file".to_owned()));
    }
    if let Some(folder) = file.parent() {
        let unusable = |error| wrong(format!("can't create {}: {error}", folder.display()));
        fs::create_dir_all(folder).map_err(unusable)?;
    }
    let mut options = File::options();
    options.write(true);
    match force {
        true => options.create(true).truncate(true),
        false => options.create_new(true),
    };
    let mut opened = options.open(file).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::Usage(
            format!(
                "{} exists; --force overwrites it, and --out FILE writes another file",
                file.display()
            )
            .into(),
        ),
        _ => wrong(format!("can't be written: {error}")),
    })?;
    opened.write_all(text.as_bytes()).map_err(|error| {
        Failure::Failed(format!("{} can't be written: {error}", file.display()).into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_configs_is_a_kind_and_loads() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let files = folder.read_dir().unwrap().map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".toml").unwrap().to_owned()
        });
        let files: BTreeSet<String> = files.collect();
        let kinds: BTreeSet<String> = KINDS.iter().map(|kind| kind.name.to_owned()).collect();
        assert_eq!(files, kinds);
        let on_cpu = [
            "train.device=cpu",
            "encode.devices=[\"cpu\"]",
            "encode.dtype=f32",
            "encode.vae_dtype=f32",
            "train.mixed_precision=no",
        ];
        let on_cpu = on_cpu.map(str::to_owned);
        for kind in KINDS {
            let config = Config::parse(kind.text, kind.name, &on_cpu).unwrap();
            let [_, command] = kind.commands(Path::new("a.toml"));
            if kind.name.starts_with("precompute") {
                config.require_precompute().unwrap();
                assert_eq!(command, "coffey precompute -c a.toml");
            } else {
                config.require_train().unwrap();
                assert_eq!(command, "coffey train -c a.toml");
            }
            assert_eq!(kind.embedded_root(), config.s3.embedded_root);
            let description = kind.description();
            assert!(
                kind.text.starts_with("# ") && (20..110).contains(&description.len()),
                "{}: {description}",
                kind.name
            );
        }
    }
}
