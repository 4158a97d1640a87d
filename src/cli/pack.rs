//! `coffey pack`: a folder of images in, shards out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use coffey_pipeline::pack::{MOST_SAMPLES, PackError, Packed, check_apart, pack};
use coffey_pipeline::{ShardUrl, SourceOptions, counted};

use super::Failure;
use super::output::check_writable;
use super::resources::{DataAccess, source_options};
use crate::config::{Config, in_s3};
use crate::progress::{Progress, ProgressOptions};
use crate::signals::cancel_on_signals;

/// Options of `coffey pack`.
#[derive(Args, Debug)]
pub(super) struct PackArgs {
    /// Folder of images, with captions beside them (x.jpg, x.txt) or in metadata.jsonl or metadata.csv; subfolders are read.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
    /// Folder, or s3://bucket/prefix/, for the shards 00000.tar, 00001.tar … S3 is reached as the AWS environment says, or
    /// `[s3]` of --config.
    #[arg(short, long, value_name = "TARGET")]
    out: String,
    /// Samples in each shard.
    #[arg(long, value_name = "N", default_value_t = MOST_SAMPLES as u64, value_parser = clap::value_parser!(u64).range(1..=MOST_SAMPLES as u64))]
    samples_per_shard: u64,
    /// Take [s3], and the keys of images and captions in [data], from this file.
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set one of these keys, as `s3.anonymous=true`, with or without a file.
    #[arg(short = 's', long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl From<PackError> for Failure {
    fn from(error: PackError) -> Self {
        match error {
            PackError::Stream(error) => error.into(),
            PackError::Source(error) => error.into(),
            PackError::Stopped => Self::Stopped,
            PackError::Occupied { .. } | PackError::OtherSize { .. } | PackError::Place { .. } => {
                Self::Usage(error.into())
            }
            PackError::NoImages { .. }
            | PackError::Unreadable { .. }
            | PackError::Nothing { .. } => Self::Failed(error.into()),
        }
    }
}

/// Runs `coffey pack`.
pub(super) fn run(args: PackArgs) -> Result<(), Failure> {
    let folder = args.folder.to_string_lossy();
    if folder.contains("://") && !args.folder.exists() {
        let cause = "pack reads local folders only; copy it first";
        return Err(Failure::Usage(format!("{folder}: {cause}").into()));
    }
    let out = Path::new(&args.out);
    let is_local = !in_s3(out);
    if is_local {
        check_apart(&args.folder, out)?;
    }
    let cancel = cancel_on_signals()?;
    let config = match &args.config {
        Some(path) => Config::load(path, &args.set)?,
        None => {
            let folder = toml::Value::from(&*args.folder.to_string_lossy());
            let text = format!("data.shards = {folder}");
            Config::parse(&text, "the command line", &args.set)?
        }
    };
    config.require_bench()?;
    let data = DataAccess::open(SourceOptions {
        cache: None,
        ..source_options(&config)
    })?;
    let runtime = data.runtime.handle();
    if is_local {
        check_writable("--out", out, &data)?;
    }
    let place = data.sources.destination(&args.out, runtime)?;
    let start = Instant::now();
    let mut progress = None;
    let packed = pack(
        &data.sources,
        &ShardUrl::file(&args.folder),
        &place,
        args.samples_per_shard as usize,
        (runtime, &cancel),
        |packed, total| {
            let progress = progress.get_or_insert_with(|| {
                Progress::new(ProgressOptions {
                    total,
                    template: "{spinner} {wide_bar} {pos}/{len} images  {msg}",
                    line_every: Duration::from_secs(10),
                })
            });
            let so_far = || so_far(packed, start.elapsed());
            progress.update(packed.seen, &so_far(), || {
                format!(
                    "{} of {}; {}",
                    packed.seen,
                    counted(total, "image"),
                    so_far()
                )
            });
        },
    )?;
    drop(progress);
    if packed.kept > 0 {
        errln!(
            "{} already in {} (by the names, sizes and times of the files; contents were not read again)",
            counted(packed.kept, "shard"),
            args.out
        );
    }
    errln!(
        "{} in {}, {:.1} MB, in {:.1} s",
        counted(packed.samples, "sample"),
        counted(packed.shards, "shard"),
        packed.bytes as f64 / 1e6,
        start.elapsed().as_secs_f64()
    );
    if !packed.left_out.is_empty() {
        errln!("left out: {}", packed.describe_left_out());
    }
    if let Some((count, first)) = &packed.gone {
        errln!(
            "{} went away before they were packed (the first is {first}), and their shards are not finished: run the command again",
            counted(*count, "file")
        );
    }
    outln!("{place}");
    Ok(())
}

/// The rate, and the number of samples left out.
fn so_far(packed: &Packed, elapsed: Duration) -> String {
    let rate = packed.seen as f64 / elapsed.as_secs_f64().max(1e-3);
    let left_out: u64 = packed.left_out.values().sum();
    format!("{rate:.0} images/s, {left_out} left out")
}
