//! What TensorBoard is told of a run: the numbers of `metrics.jsonl` and the grids of `samples/`, which stay the source.
//!
//! A run never fails for it: what can't be written is said once, and the next start writes what is missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::log::StepRecord;
use super::progress::Progress;
use super::report::{GRIDS, grid_path};
use crate::track::{Events, TrackError};

/// A run's event files, if they are wanted and can be written.
#[derive(Debug)]
pub(super) struct Tracker {
    folder: PathBuf,
    events: Option<Events>,
}

impl Tracker {
    /// Goes on after step `done`, whose records those of `metrics.jsonl` are. Event files that lack one of them, or one of the
    /// grids, are written anew.
    pub(super) fn open(
        wanted: bool,
        folder: &Path,
        (done, records): (u64, &[StepRecord]),
        configuration: &str,
        progress: &Progress,
    ) -> Self {
        let mut tracker = Self {
            folder: folder.to_owned(),
            events: None,
        };
        if !wanted {
            return tracker;
        }
        match resumed(folder, done, records, configuration) {
            Ok(events) => tracker.events = Some(events),
            Err(error) => complain(&error, progress),
        }
        tracker
    }

    /// A step was made.
    pub(super) fn step(&mut self, record: &StepRecord, progress: &Progress) {
        self.tell(progress, |events, _| write_step(events, record));
    }

    /// The grids of a step stand in `samples/`.
    pub(super) fn grids(&mut self, step: u64, progress: &Progress) {
        self.tell(progress, |events, folder| {
            GRIDS
                .iter()
                .try_for_each(|name| write_grid(events, folder, step, name))
        });
    }

    /// Waits until what was told is on the disk: a checkpoint is never newer.
    pub(super) fn sync(&mut self, progress: &Progress) {
        self.tell(progress, |events, _| events.sync());
    }

    /// Whoever can't be told is not told anything any more: a record that was cut off would hide what follows it.
    fn tell(
        &mut self,
        progress: &Progress,
        what: impl FnOnce(&mut Events, &Path) -> Result<(), TrackError>,
    ) {
        if let Some(events) = &mut self.events
            && let Err(error) = what(events, &self.folder)
        {
            self.events = None;
            complain(&error, progress);
        }
    }
}

fn complain(error: &TrackError, progress: &Progress) {
    progress.say(format!(
        "warning: no TensorBoard events from here on: {error}; training goes on, metrics.jsonl has every step, and the next \
         start of this run writes the events that are missing"
    ));
}

fn resumed(
    folder: &Path,
    done: u64,
    records: &[StepRecord],
    configuration: &str,
) -> Result<Events, TrackError> {
    let (mut events, kept) = Events::open(folder, done, configuration)?;
    let grids = grids_up_to(folder, done)?;
    let tagged: BTreeSet<_> = grids
        .iter()
        .map(|(step, name)| (*step, tag(name)))
        .collect();
    let steps = records.iter().map(|record| record.step);
    if !steps.eq(kept.scalars) || !tagged.is_subset(&kept.pictures) {
        events.clear()?;
        for record in records {
            write_step(&mut events, record)?;
        }
        for (step, name) in &grids {
            write_grid(&mut events, folder, *step, name)?;
        }
        events.sync()?;
    }
    Ok(events)
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
fn write_step(events: &mut Events, record: &StepRecord) -> Result<(), TrackError> {
    let mut values = vec![
        ("loss", record.loss),
        ("lr", record.lr),
        ("grad_norm", record.grad_norm),
        ("samples_per_second", record.samples_per_second),
    ];
    values.extend(record.loss_scale.map(|scale| ("loss_scale", scale)));
    values.extend(record.endpoint_error.map(|error| ("endpoint_error", error)));
    events.scalars(record.step, &values)
}

fn write_grid(events: &mut Events, folder: &Path, step: u64, name: &str) -> Result<(), TrackError> {
    let path = grid_path(folder, step, name);
    let failed = |source| TrackError {
        path: path.clone(),
        source,
    };
    let png = std::fs::read(&path).map_err(failed)?;
    let size = image::image_dimensions(&path).map_err(|e| failed(std::io::Error::other(e)))?;
    events.picture(step, &tag(name), size, png)
}

fn tag(name: &str) -> String {
    format!("validation/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::RgbImage;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 0.5,
            lr: 1e-4,
            grad_norm: 1.0,
            loss_scale: None,
            samples: 4 * step,
            epoch: 0,
            endpoint_error: step.is_multiple_of(2).then_some(0.25),
            samples_per_second: 2.0,
            seconds: 1.0,
            limiting_stage: None,
        }
    }

    fn kept(folder: &Path) -> (Vec<u64>, Vec<(u64, String)>) {
        let (_, kept) = Events::open(folder, u64::MAX, "").unwrap();
        (kept.scalars, kept.pictures.into_iter().collect())
    }

    #[test]
    fn events_that_are_missing_are_written_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let progress = Progress::new(4);
        let records: Vec<_> = (1..=4).map(record).collect();
        let open = |done: usize| {
            let done = (done as u64, &records[..done]);
            Tracker::open(true, folder, done, "a = 1\n", &progress)
        };
        for (step, name) in [(2, "target"), (2, "online"), (6, "online")] {
            let picture = RgbImage::new(3, 2);
            crate::draw::save_png(&picture, &grid_path(folder, step, name)).unwrap();
        }
        std::fs::write(folder.join("samples/step-1-other.png"), "").unwrap();
        let grids = [(2, "online"), (2, "target")].map(|(step, name)| (step, tag(name)));
        // Tracked from the third step on, and two steps missed.
        let mut tracker = open(2);
        assert_eq!(kept(folder), (vec![1, 2], grids.to_vec()));
        tracker.step(&records[2], &progress);
        drop(open(4));
        assert_eq!(kept(folder), (vec![1, 2, 3, 4], grids.to_vec()));
        let before = std::fs::read_dir(folder).unwrap().count();
        // Nothing is missing now, and nothing is written.
        drop(open(4));
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), before);
        // A grid that was drawn and not told of.
        crate::draw::save_png(&RgbImage::new(3, 2), &grid_path(folder, 4, "online")).unwrap();
        drop(open(4));
        assert_eq!(kept(folder).1.len(), 3);
    }

    #[test]
    fn a_failure_is_no_failure_of_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let progress = Progress::new(4);
        let none = (0, &[][..]);
        let mut tracker = Tracker::open(true, folder.path(), none, "", &progress);
        // A grid that is not there.
        tracker.grids(1, &progress);
        assert!(tracker.events.is_none());
        tracker.step(&record(1), &progress);
        tracker.sync(&progress);
        let mut unwanted = Tracker::open(false, folder.path(), none, "", &progress);
        unwanted.step(&record(1), &progress);
        assert_eq!(kept(folder.path()), (Vec::new(), Vec::new()));
        let gone = Tracker::open(true, &folder.path().join("gone"), none, "", &progress);
        assert!(gone.events.is_none());
    }
}
