//! `metrics.jsonl`: exactly one line a step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::rc::Rc;

use coffey_pipeline::bounded;

use super::append_log::AppendLog;
use super::log_faults::LogFaults;
use super::{Earlier, Observer, RunView, StepReport};
use crate::progress::Progress;
use crate::train::record::StepRecord;
use crate::train::{TrainError, io};

/// The log of a run.
#[derive(Debug)]
pub(in crate::train) struct MetricsLog {
    file: AppendLog,
    progress: Rc<Progress>,
}

impl MetricsLog {
    /// Opens the log of a run that resumes after step `done`, with the records of the steps so far. Drops the lines of later
    /// steps: the run makes those steps again. Warns of steps without a line; `elsewhere`: the steps up to `done` may have been
    /// made in another folder.
    pub(in crate::train) fn open(
        folder: &Path,
        done: u64,
        elsewhere: bool,
        progress: Rc<Progress>,
    ) -> Result<(Self, Vec<StepRecord>), TrainError> {
        let path = folder.join("metrics.jsonl");
        let text = match bounded::read_file(&path, u64::MAX) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            read => read.map_err(io(&path))?,
        };
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().count();
        let mut faults = LogFaults::default();
        let mut lines = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let Ok(record) = serde_json::from_str::<StepRecord>(line) else {
                // A crash cuts off the last line. It belongs to a step that is made again.
                if number < last {
                    faults.unreadable(number);
                }
                continue;
            };
            if record.step > done {
                continue;
            }
            let step = record.step;
            if lines
                .last_key_value()
                .is_some_and(|(last, _)| *last >= step)
            {
                faults.misplaced(number);
            }
            lines.entry(step).or_insert((line, record));
        }
        if !(lines.is_empty() && elsewhere) {
            faults.find_gaps(lines.keys().copied(), done);
        }
        faults.say(&path, "the curves and the page lack them", &progress);
        let mut kept = String::new();
        let mut records = Vec::new();
        for (line, record) in lines.into_values() {
            kept.push_str(line);
            kept.push('\n');
            records.push(record);
        }
        let aside = folder.join(".metrics.jsonl.tmp");
        fs::write(&aside, kept).map_err(io(&aside))?;
        File::open(&aside)
            .and_then(|f| f.sync_all())
            .map_err(io(&aside))?;
        fs::rename(&aside, &path).map_err(io(&path))?;
        let file = AppendLog::open(&path)?;
        Ok((Self { file, progress }, records))
    }

    fn append(&mut self, record: &StepRecord) {
        // A record holds finite numbers, nulls and names alone: serialisation can't fail.
        if let Ok(mut line) = serde_json::to_string(record) {
            line.push('\n');
            self.file.append(line.as_bytes(), &self.progress);
        }
    }
}

impl Observer for MetricsLog {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.append(&report.record);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), TrainError> {
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::record::fixture::record;
    use super::*;

    #[test]
    fn metrics_log_keeps_one_line_a_step_of_a_damaged_file() {
        let folder = tempfile::tempdir().unwrap();
        let line = |step| serde_json::to_string(&record(step)).unwrap();
        let damaged = [line(1), line(4), "{".to_owned(), line(3), line(4), line(6)].join("\n");
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, damaged).unwrap();
        let (_, records) = MetricsLog::open(folder.path(), 5, false, Progress::hidden()).unwrap();
        let steps: Vec<u64> = records.iter().map(|record| record.step).collect();
        assert_eq!(steps, [1, 3, 4]);
        let kept = fs::read_to_string(&path).unwrap();
        assert_eq!(kept, [line(1), line(3), line(4), String::new()].join("\n"));
    }

    #[test]
    fn metrics_log_drops_later_and_broken_lines_on_resume() {
        let folder = tempfile::tempdir().unwrap();
        let open = |done| MetricsLog::open(folder.path(), done, false, Progress::hidden()).unwrap();
        let (mut log, _) = open(0);
        for step in 1..=5 {
            log.append(&record(step));
        }
        let path = folder.path().join("metrics.jsonl");
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 10]).unwrap();
        let (mut log, records) = open(3);
        log.append(&record(4));
        let steps: Vec<u64> = fs::read_to_string(&path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<StepRecord>(line).unwrap().step)
            .collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(records.len(), 3);
        assert!(
            open(0).1.is_empty(),
            "a run from the start has an empty log"
        );
    }
}
