//! `skipped.jsonl`: which samples of the finished shards were left out, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use coffey_pipeline::SkippedSample;
use serde::{Deserialize, Serialize};

use super::LatentError;
use super::aside::{Aside, remove_leftover};

#[derive(Serialize)]
struct Line<'a> {
    shard: &'a str,
    key: &'a str,
    reason: &'a str,
}

/// What a line is read again for.
#[derive(Deserialize)]
struct Known {
    shard: String,
}

/// The file, which exists once there is something to say, and what waits for its shard to be finished.
#[derive(Debug)]
pub(super) struct SkippedFile {
    path: PathBuf,
    waiting: BTreeMap<usize, Vec<SkippedSample>>,
}

impl SkippedFile {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            waiting: BTreeMap::new(),
        }
    }

    /// Keeps the lines of `finished` shards (by URL, without secrets) alone: a run that was killed may have left some of a
    /// shard that will be made again.
    pub(super) fn keep(&self, finished: &BTreeSet<String>) -> Result<(), LatentError> {
        let path = &self.path;
        remove_leftover(path)?;
        match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(LatentError::io(path)(error)),
            Ok(file) => keep(path, BufReader::new(file), finished),
        }
    }

    /// Takes note of samples that were left out.
    pub(super) fn add(&mut self, samples: &[SkippedSample]) {
        for sample in samples {
            let waiting = self.waiting.entry(sample.shard).or_default();
            waiting.push(sample.clone());
        }
    }

    /// Writes those of a shard that ends now. `url` is without secrets.
    pub(super) fn finish(&mut self, shard: usize, url: &str) -> Result<(), LatentError> {
        let Some(samples) = self.waiting.remove(&shard) else {
            return Ok(());
        };
        let mut lines = Vec::new();
        for sample in &samples {
            let line = Line {
                shard: url,
                key: &sample.key,
                reason: &sample.reason,
            };
            serde_json::to_writer(&mut lines, &line)
                .map_err(|error| LatentError::io(&self.path)(error.into()))?;
            lines.push(b'\n');
        }
        let append = |path: &Path| {
            let mut file = File::options().append(true).create(true).open(path)?;
            file.write_all(&lines)?;
            file.sync_data()
        };
        append(&self.path).map_err(LatentError::io(&self.path))
    }
}

/// Rewrites the file at `path` with those of its lines that are of `finished` shards.
fn keep(
    path: &Path,
    mut lines: impl BufRead,
    finished: &BTreeSet<String>,
) -> Result<(), LatentError> {
    let mut kept = BufWriter::new(Aside::create(path)?);
    let mut line = Vec::new();
    let mut copy = || -> std::io::Result<()> {
        while lines.read_until(b'\n', &mut line)? > 0 {
            // A line cut off by a crash does not parse; its shard was not finished.
            let known = serde_json::from_slice::<Known>(&line);
            if known.is_ok_and(|known| finished.contains(&known.shard)) {
                kept.write_all(&line)?;
            }
            line.clear();
        }
        Ok(())
    };
    copy().map_err(LatentError::io(path))?;
    kept.into_inner()
        .map_err(|error| LatentError::io(path)(error.into_error()))?
        .commit()
}
