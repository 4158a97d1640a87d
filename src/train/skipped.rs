//! `skipped.jsonl`: one line a sample left out, in the order of the stream, none missing and none twice.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use coffey_pipeline::{ShardUrl, SkippedSample};
use serde::{Deserialize, Serialize};

use super::{TrainError, io};

#[derive(Serialize)]
struct Line<'a> {
    /// The step whose samples it would have been among.
    step: u64,
    /// The shard's URL, without secrets.
    shard: String,
    key: &'a str,
    reason: &'a str,
}

/// What a line is read again for.
#[derive(Deserialize)]
struct Known {
    step: u64,
    reason: String,
}

/// The open file of a run. It holds counts alone: the file may grow to as many lines as there are samples.
#[derive(Debug)]
pub(super) struct SkippedLog {
    path: PathBuf,
    file: File,
    counts: BTreeMap<String, u64>,
}

impl SkippedLog {
    /// Opens the file of a run that goes on after step `done`: later lines, of steps that will be made again, are cut off.
    pub(super) fn open(folder: &Path, done: u64) -> Result<Self, TrainError> {
        let path = folder.join("skipped.jsonl");
        let opened = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path);
        let file = opened.map_err(io(&path))?;
        let (length, counts) = kept(BufReader::new(&file), done).map_err(io(&path))?;
        file.set_len(length).map_err(io(&path))?;
        Ok(Self { path, file, counts })
    }

    /// Appends what was left out on the way to the batches of `step`; `shards` are the stream's.
    pub(super) fn write(
        &mut self,
        step: u64,
        shards: &[ShardUrl],
        skipped: &[SkippedSample],
    ) -> Result<(), TrainError> {
        let mut lines = Vec::new();
        for sample in skipped {
            let line = Line {
                step,
                shard: shards
                    .get(sample.shard)
                    .map(ShardUrl::redacted)
                    .unwrap_or_default(),
                key: &sample.key,
                reason: &sample.reason,
            };
            serde_json::to_writer(&mut lines, &line).map_err(|e| io(&self.path)(e.into()))?;
            lines.push(b'\n');
            *self.counts.entry(sample.reason.clone()).or_default() += 1;
        }
        self.file.write_all(&lines).map_err(io(&self.path))
    }

    /// Waits until what was written is on the disk: a checkpoint is never newer than its lines.
    pub(super) fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(io(&self.path))
    }

    /// How many samples were left out since the run's first step, by reason.
    pub(super) fn counts(&self) -> &BTreeMap<String, u64> {
        &self.counts
    }
}

/// The length in bytes of the lines of steps up to `done`, which come first, and their counts by reason. A line that a crash cut
/// off belongs to a later step.
fn kept(mut reader: impl BufRead, done: u64) -> std::io::Result<(u64, BTreeMap<String, u64>)> {
    let (mut length, mut counts, mut line) = (0, BTreeMap::new(), Vec::new());
    loop {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)?;
        match serde_json::from_slice::<Known>(&line) {
            Ok(known) if known.step <= done && line.ends_with(b"\n") => {
                *counts.entry(known.reason).or_default() += 1;
            }
            _ => return Ok((length, counts)),
        }
        length += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(key: &str, reason: &str) -> SkippedSample {
        SkippedSample {
            shard: 0,
            key: key.into(),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn going_on_cuts_later_and_broken_lines_off() {
        let folder = tempfile::tempdir().unwrap();
        let shards = ["https://h/0.tar?signature=secret".parse().unwrap()];
        let mut log = SkippedLog::open(folder.path(), 0).unwrap();
        log.write(
            1,
            &shards,
            &[skipped("a", "no_image"), skipped("b", "bad_json")],
        )
        .unwrap();
        log.write(2, &shards, &[]).unwrap();
        log.write(3, &shards, &[skipped("c", "no_image")]).unwrap();
        log.write(4, &shards, &[skipped("\"d\n", "no_image")])
            .unwrap();
        log.sync().unwrap();
        let path = folder.path().join("skipped.jsonl");
        let whole = std::fs::read_to_string(&path).unwrap();
        assert_eq!(whole.lines().count(), 4);
        assert!(
            whole.starts_with(
                "{\"step\":1,\"shard\":\"https://h/0.tar?REDACTED\",\"key\":\"a\",\"reason\":\"no_image\"}\n"
            ),
            "{whole}"
        );
        // Killed within the last line, and going on from the checkpoint of step 3.
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let log = SkippedLog::open(folder.path(), 3).unwrap();
        let left: Vec<_> = whole.lines().take(3).collect();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept.lines().collect::<Vec<_>>(), left);
        assert_eq!(
            log.counts(),
            &BTreeMap::from([("bad_json".to_owned(), 1), ("no_image".to_owned(), 2)])
        );
        let log = SkippedLog::open(folder.path(), 0).unwrap();
        assert!(log.counts().is_empty());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
