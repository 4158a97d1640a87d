//! `skipped.jsonl`: exactly one line for each skipped sample, in stream order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::rc::Rc;

use coffey_pipeline::{ShardUrl, SkippedSample};
use serde::{Deserialize, Serialize};

use super::append_log::AppendLog;
use super::log_faults::LogFaults;
use super::{Earlier, Observer, RunView, StepReport};
use crate::progress::Progress;
use crate::train::checkpoint::Saver;
use crate::train::{TrainError, io};

#[derive(Serialize)]
struct SkippedLine<'a> {
    /// The step whose batches the sample would have been in.
    step: u64,
    /// The shard's URL, without secrets.
    shard: String,
    key: &'a str,
    reason: &'a str,
}

/// The fields of a line that are read again on resume.
#[derive(Deserialize)]
struct CountedLine {
    step: u64,
    reason: String,
}

/// Skipped samples since the run's first step, by reason.
pub(in crate::train) type SkipCounts = Rc<RefCell<BTreeMap<String, u64>>>;

/// The file of a run. Only counts stay in memory: the file may grow to one line a sample.
#[derive(Debug)]
pub(in crate::train) struct SkippedLog {
    file: AppendLog,
    shards: Vec<ShardUrl>,
    counts: SkipCounts,
    progress: Rc<Progress>,
}

impl SkippedLog {
    /// Opens the file of a run that resumes after step `done`, and truncates the lines of later steps: the run makes those steps
    /// again. `shards` are the stream's. Warns of damaged lines, and of a missing file unless the steps up to `done` may have been
    /// made `elsewhere`.
    pub(in crate::train) fn open(
        folder: &Path,
        done: u64,
        elsewhere: bool,
        shards: Vec<ShardUrl>,
        progress: Rc<Progress>,
    ) -> Result<Self, TrainError> {
        let path = folder.join("skipped.jsonl");
        let is_lost = done > 0 && !elsewhere && !path.exists();
        let mut file = AppendLog::open(&path)?;
        let reader = BufReader::new(file.file());
        let (length, counts, mut faults) = kept(reader, done).map_err(io(&path))?;
        if is_lost {
            faults.find_gaps(std::iter::empty(), done);
        }
        faults.say(&path, "samples skipped there are not counted", &progress);
        file.truncate(length)?;
        Ok(Self {
            file,
            shards,
            counts: Rc::new(RefCell::new(counts)),
            progress,
        })
    }

    /// Skipped samples since the run's first step, by reason. Clones see later counts.
    pub(in crate::train) fn counts(&self) -> SkipCounts {
        Rc::clone(&self.counts)
    }

    fn append(&mut self, step: u64, skipped: &[SkippedSample]) {
        let mut lines = Vec::new();
        let mut counts = self.counts.borrow_mut();
        for sample in skipped {
            let line = SkippedLine {
                step,
                shard: self
                    .shards
                    .get(sample.shard)
                    .map(ToString::to_string)
                    .unwrap_or_default(),
                key: &sample.key,
                reason: &sample.reason,
            };
            // A line holds numbers and texts alone: serialisation can't fail.
            if let Ok(line) = serde_json::to_string(&line) {
                lines.extend_from_slice(line.as_bytes());
                lines.push(b'\n');
            }
            *counts.entry(sample.reason.clone()).or_default() += 1;
        }
        self.file.append(&lines, &self.progress);
    }
}

impl Observer for SkippedLog {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.append(report.record.step, &report.skipped);
        Ok(())
    }

    fn on_failed(&mut self, step: u64, skipped: &[SkippedSample]) -> Result<(), TrainError> {
        self.append(step, skipped);
        self.file.sync()
    }

    fn sync(&mut self) -> Result<(), TrainError> {
        self.file.sync()
    }
}

/// Lists the skipped samples of a run that ends in an error by `list`, uploads the list, and says that it is in `output`.
pub(in crate::train) fn list_skipped(
    skipped: &[SkippedSample],
    list: impl FnOnce() -> Result<(), TrainError>,
    saver: &Saver,
    output: &Path,
    progress: &Progress,
) {
    if skipped.is_empty() {
        return;
    }
    match list().and_then(|()| saver.records().upload()) {
        Ok(()) => progress.say(format!(
            "skipped samples are listed in {}",
            output.join("skipped.jsonl").display()
        )),
        Err(error) => progress.say(format!(
            "warning: the skipped samples could not be listed: {error}"
        )),
    }
}

/// Length in bytes of the lines of steps up to `done`, which come first, their counts by reason, and the damaged lines among
/// them. A line that a crash cut off belongs to a later step.
fn kept(
    mut reader: impl BufRead,
    done: u64,
) -> std::io::Result<(u64, BTreeMap<String, u64>, LogFaults)> {
    let (mut length, mut counts, mut faults) = (0, BTreeMap::new(), LogFaults::default());
    let (mut line, mut end, mut last) = (Vec::new(), 0, 0);
    // Lines that do not parse, since the last one that does.
    let mut unreadable = Vec::new();
    for number in 1.. {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line)?;
        if bytes == 0 {
            break;
        }
        end += bytes as u64;
        let Ok(known) = serde_json::from_slice::<CountedLine>(&line) else {
            unreadable.push(number);
            continue;
        };
        if known.step > done || !line.ends_with(b"\n") {
            continue;
        }
        unreadable
            .drain(..)
            .for_each(|line| faults.unreadable(line));
        if known.step < last {
            faults.misplaced(number);
        }
        last = last.max(known.step);
        *counts.entry(known.reason).or_default() += 1;
        length = end;
    }
    Ok((length, counts, faults))
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
    fn skipped_log_truncates_later_and_broken_lines_on_resume() {
        let folder = tempfile::tempdir().unwrap();
        let open = |done| {
            let shards = vec!["https://h/0.tar?signature=secret".parse().unwrap()];
            SkippedLog::open(folder.path(), done, false, shards, Progress::hidden()).unwrap()
        };
        let mut log = open(0);
        log.append(1, &[skipped("a", "no_image"), skipped("b", "bad_json")]);
        log.append(2, &[]);
        log.append(3, &[skipped("c", "no_image")]);
        log.append(4, &[skipped("\"d\n", "no_image")]);
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
        // Killed within the last line; resumed from the checkpoint of step 3.
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let log = open(3);
        let left: Vec<_> = whole.lines().take(3).collect();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept.lines().collect::<Vec<_>>(), left);
        assert_eq!(
            *log.counts().borrow(),
            BTreeMap::from([("bad_json".to_owned(), 1), ("no_image".to_owned(), 2)])
        );
        // A damaged line costs that line alone.
        let damaged = whole.replacen("{\"step\":1", "{", 1);
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(open(3).counts().borrow().values().sum::<u64>(), 2);
        let log = open(0);
        assert!(log.counts().borrow().is_empty());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
