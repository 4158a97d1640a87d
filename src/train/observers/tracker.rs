//! Experiment trackers: the numbers of `metrics.jsonl` and the grids of `samples/`, which stay the source.
//!
//! A failure never ends a run: it is reported once, and the next start of the run writes the events that are missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::grids::{GRIDS, grid_path};
use super::{Earlier, Ending, Observer, RunView, StepReport};
use crate::config::Track;
use crate::progress::Progress;
use crate::track::{EventWriter, ExistingEvents, OfflineRun, TensorBoard, TrackError};
use crate::train::TrainError;
use crate::train::record::StepRecord;

/// The files of one tracker; nothing is written once they can't be written.
#[derive(Debug)]
pub(in crate::train) struct Tracker {
    name: &'static str,
    folder: PathBuf,
    /// Folder or `s3://` prefix of the run, for messages.
    place: PathBuf,
    writer: Option<Box<dyn EventWriter>>,
    progress: Rc<Progress>,
}

/// A run whose trackers are opened.
#[derive(Clone, Copy, Debug)]
pub(in crate::train) struct TrackedRun<'a> {
    /// Folder of the run's records.
    pub(in crate::train) folder: &'a Path,
    /// Folder or `s3://` prefix of the run.
    pub(in crate::train) place: &'a Path,
    /// Step that the run resumes from.
    pub(in crate::train) step: u64,
    /// Records of `metrics.jsonl`, whose events are written where they are missing.
    pub(in crate::train) records: &'a [StepRecord],
    /// The configuration (TOML).
    pub(in crate::train) configuration: &'a str,
    pub(in crate::train) progress: &'a Rc<Progress>,
}

impl TrackedRun<'_> {
    /// Opens the trackers that `[track]` names.
    pub(in crate::train) fn open(&self, track: &Track) -> Vec<Tracker> {
        let mut trackers = Vec::new();
        let (folder, step) = (self.folder, self.step);
        if track.tensorboard {
            let opened = TensorBoard::open(folder, step, self.configuration);
            trackers.push(self.resume("TensorBoard", opened));
        }
        if let Some(project) = &track.wandb {
            let name = self.place.file_name().unwrap_or_default().to_string_lossy();
            let opened = OfflineRun::open(folder, project, &name, step, self.configuration);
            trackers.push(self.resume("W&B", opened));
        }
        trackers
    }

    fn resume<W: EventWriter + 'static>(
        &self,
        name: &'static str,
        opened: Result<(W, ExistingEvents), TrackError>,
    ) -> Tracker {
        let mut tracker = Tracker {
            name,
            folder: self.folder.to_owned(),
            place: self.place.to_owned(),
            writer: None,
            progress: Rc::clone(self.progress),
        };
        let completed = opened.and_then(|(mut writer, existing)| {
            complete(&mut writer, self.folder, self.records, &existing)?;
            Ok(writer)
        });
        match completed {
            Ok(writer) => tracker.writer = Some(Box::new(writer)),
            Err(error) => tracker.warn(&error),
        }
        tracker
    }
}

impl Tracker {
    fn step(&mut self, record: &StepRecord) {
        self.write(|writer, _| write_step(writer, record));
    }

    /// Writes to the files, or stops writing for good: a truncated record would hide those after it.
    fn write<T>(
        &mut self,
        write: impl FnOnce(&mut dyn EventWriter, &Path) -> Result<T, TrackError>,
    ) -> Option<T> {
        match write(self.writer.as_deref_mut()?, &self.folder) {
            Ok(value) => Some(value),
            Err(error) => {
                self.writer = None;
                self.warn(&error);
                None
            }
        }
    }

    fn warn(&self, error: &TrackError) {
        let name = self.name;
        self.progress.say(format!(
            "warning: no events for {name} from here on: {error}; training goes on, metrics.jsonl has every step, and the next \
             start of this run writes the events that are missing"
        ));
    }
}

impl Observer for Tracker {
    fn on_step(
        &mut self,
        report: &mut StepReport,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        self.step(&report.record);
        Ok(())
    }

    fn on_grids(&mut self, step: u64) {
        self.write(|writer, folder| {
            let [target, online] = GRIDS;
            // A student without a moving average has no grid of it.
            if grid_path(folder, step, target).is_file() {
                write_grid(writer, folder, step, target)?;
            }
            write_grid(writer, folder, step, online)
        });
    }

    fn sync(&mut self) -> Result<(), TrainError> {
        self.write(|writer, _| writer.sync());
        Ok(())
    }

    fn on_end(
        &mut self,
        ending: Ending,
        _run: &RunView<'_>,
        _earlier: &mut Earlier<'_>,
    ) -> Result<(), TrainError> {
        if ending == Ending::Done
            && let Some(Some(offline)) = self.write(|writer, _| writer.finish())
        {
            let (name, offline) = (self.name, self.place.join(offline));
            let offline = offline.display();
            self.progress
                .say(format!("{name}: `wandb sync` uploads {offline}"));
        }
        Ok(())
    }
}

/// Writes the events that a tracker's files lack: the newest ones, or all of them where an earlier one is missing. Events of steps
/// that `metrics.jsonl` lost stay.
fn complete(
    writer: &mut dyn EventWriter,
    folder: &Path,
    records: &[StepRecord],
    existing: &ExistingEvents,
) -> Result<(), TrackError> {
    let done = records.last().map_or(0, |record| record.step);
    let written = existing.scalars.last().copied().unwrap_or(0);
    let grids = grids_up_to(folder, done)?;
    let steps: BTreeSet<u64> = existing.scalars.iter().copied().collect();
    let mut earlier = records.iter().filter(|record| record.step <= written);
    let has_steps = earlier.all(|record| steps.contains(&record.step));
    let mut tagged = grids.iter().filter(|(step, _)| *step <= written);
    let has_grids = tagged.all(|(step, name)| existing.pictures.contains(&(*step, tag(name))));
    let written = if has_steps && has_grids {
        written
    } else {
        writer.clear()?;
        0
    };
    let mut missing = records
        .iter()
        .filter(|record| record.step > written)
        .peekable();
    if missing.peek().is_none() {
        return Ok(());
    }
    for record in missing {
        write_step(writer, record)?;
        for (step, name) in grids.range((record.step, "")..(record.step + 1, "")) {
            write_grid(writer, folder, *step, name)?;
        }
    }
    writer.sync()
}

/// The step and the name of each grid in `samples/`.
fn grids_up_to(folder: &Path, done: u64) -> Result<BTreeSet<(u64, &'static str)>, TrackError> {
    let samples = folder.join("samples");
    let failed = |source| TrackError {
        path: samples.clone(),
        source,
    };
    let entries = match samples.read_dir() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries.map_err(failed)?,
    };
    let mut grids = BTreeSet::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let numbered = stem.strip_prefix("step-").and_then(|s| s.split_once('-'));
        let Some((step, name)) = numbered else {
            continue;
        };
        let name = GRIDS.iter().copied().find(|known| *known == name);
        if let (Ok(step), Some(name)) = (step.parse(), name)
            && step <= done
            && grid_path(folder, step, name) == path
        {
            grids.insert((step, name));
        }
    }
    Ok(grids)
}

/// `loss` and `lr` are called as in the reference.
fn write_step(writer: &mut dyn EventWriter, record: &StepRecord) -> Result<(), TrackError> {
    let mut values = vec![
        ("loss", record.loss),
        ("lr", record.lr),
        ("grad_norm", record.grad_norm),
        ("samples_per_second", record.samples_per_second),
    ];
    values.extend(record.loss_scale.map(|scale| ("loss_scale", scale)));
    values.extend(record.endpoint_error.map(|error| ("endpoint_error", error)));
    writer.scalars(record.step, &values)
}

fn write_grid(
    writer: &mut dyn EventWriter,
    folder: &Path,
    step: u64,
    name: &str,
) -> Result<(), TrackError> {
    let path = grid_path(folder, step, name);
    let failed = |source| TrackError {
        path: path.clone(),
        source,
    };
    let png = std::fs::read(&path).map_err(failed)?;
    let size = image::image_dimensions(&path).map_err(|e| failed(std::io::Error::other(e)))?;
    writer.picture(step, &tag(name), size, png)
}

fn tag(name: &str) -> String {
    format!("validation/{name}")
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::super::super::record::fixture::record;
    use super::*;

    fn tensorboard(folder: &Path, step: u64, records: &[StepRecord]) -> Tracker {
        let run = TrackedRun {
            folder,
            place: folder,
            step,
            records,
            configuration: "a = 1\n",
            progress: &Progress::hidden(),
        };
        run.open(&Track::default()).remove(0)
    }

    fn kept(folder: &Path) -> (Vec<u64>, Vec<(u64, String)>) {
        let (_, kept) = TensorBoard::open(folder, u64::MAX, "").unwrap();
        (kept.scalars, kept.pictures.into_iter().collect())
    }

    #[test]
    fn tensorboard_writes_missing_events_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let records: Vec<_> = (1..=4).map(record).collect();
        let open = |done: usize| {
            let (step, records) = (done as u64, &records[..done]);
            tensorboard(folder, step, records)
        };
        for (step, name) in [(2, "target"), (2, "online"), (6, "online")] {
            let picture = RgbImage::new(3, 2);
            crate::draw::save_png(&picture, &grid_path(folder, step, name)).unwrap();
        }
        std::fs::write(folder.join("samples/step-1-other.png"), "").unwrap();
        let grids = [(2, "online"), (2, "target")].map(|(step, name)| (step, tag(name)));
        let mut board = open(2);
        assert_eq!(kept(folder), (vec![1, 2], grids.to_vec()));
        // Step 4 is in metrics.jsonl and not in the events.
        board.step(&records[2]);
        drop(open(4));
        assert_eq!(kept(folder), (vec![1, 2, 3, 4], grids.to_vec()));
        let before = std::fs::read_dir(folder).unwrap().count();
        // Nothing is missing, so nothing is written.
        drop(open(4));
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), before);
        // A grid that is not in the events.
        crate::draw::save_png(&RgbImage::new(3, 2), &grid_path(folder, 4, "online")).unwrap();
        drop(open(4));
        assert_eq!(kept(folder).1.len(), 3);
    }

    #[test]
    fn tensorboard_failure_is_not_the_runs_failure() {
        let folder = tempfile::tempdir().unwrap();
        let open = |folder: &Path| tensorboard(folder, 0, &[]);
        let mut board = open(folder.path());
        // The grid does not exist.
        board.on_grids(1);
        assert!(board.writer.is_none());
        board.step(&record(1));
        board.sync().unwrap();
        assert_eq!(kept(folder.path()), (Vec::new(), Vec::new()));
        assert!(open(&folder.path().join("gone")).writer.is_none());
    }
}
