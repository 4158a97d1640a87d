//! `skipped.jsonl`: one line a sample left out, in the order of the stream, none missing and none twice.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use coffey_pipeline::{ShardUrl, SkippedSample};
use serde::{Deserialize, Serialize};

use super::lines::Lines;
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
    lines: Lines,
    counts: BTreeMap<String, u64>,
}

impl SkippedLog {
    /// Opens the file of a run that goes on after step `done`: later lines, of steps that will be made again, are cut off.
    pub(super) fn open(folder: &Path, done: u64) -> Result<Self, TrainError> {
        let path = folder.join("skipped.jsonl");
        let mut lines = Lines::open(&path)?;
        let (length, counts) = kept(BufReader::new(lines.file()), done).map_err(io(&path))?;
        lines.cut(length)?;
        Ok(Self { lines, counts })
    }

    /// Appends what was left out on the way to the batches of `step`; `shards` are the stream's. See [`Lines::append`].
    pub(super) fn write(&mut self, step: u64, shards: &[ShardUrl], skipped: &[SkippedSample]) {
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
            // Numbers and texts alone: it can be put into JSON.
            if let Ok(line) = serde_json::to_string(&line) {
                lines.extend_from_slice(line.as_bytes());
                lines.push(b'\n');
            }
            *self.counts.entry(sample.reason.clone()).or_default() += 1;
        }
        self.lines.append(&lines);
    }

    /// Why lines can't be written; see [`Lines::trouble`].
    pub(super) fn trouble(&mut self) -> Option<TrainError> {
        self.lines.trouble()
    }

    /// Waits until every line is on the disk: a checkpoint is never newer than its lines.
    pub(super) fn sync(&mut self) -> Result<(), TrainError> {
        self.lines.sync()
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
        );
        log.write(2, &shards, &[]);
        log.write(3, &shards, &[skipped("c", "no_image")]);
        log.write(4, &shards, &[skipped("\"d\n", "no_image")]);
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
