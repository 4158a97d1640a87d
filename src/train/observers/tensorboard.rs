//! TensorBoard events: the numbers of `metrics.jsonl` and the grids of `samples/`, which stay the source.
//!
//! A failure never ends a run: it is reported once, and the next start of the run writes the events that are missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::grids::{GRIDS, grid_path};
use super::{Earlier, Observer, RunView, StepReport};
use crate::progress::Progress;
use crate::track::{Events, TrackError};
use crate::train::TrainError;
use crate::train::record::StepRecord;

/// The event files of a run; silent once they can't be written.
#[derive(Debug)]
pub(in crate::train) struct TensorBoard {
    folder: PathBuf,
    events: Option<Events>,
    progress: Rc<Progress>,
}

impl TensorBoard {
    /// Resumes after step `done`, up to which `records` are those of `metrics.jsonl`. Event files that lack a record or a grid are
    /// written anew.
    pub(in crate::train) fn open(
        folder: &Path,
        done: u64,
        records: &[StepRecord],
        configuration: &str,
        progress: Rc<Progress>,
    ) -> Self {
        let mut board = Self {
            folder: folder.to_owned(),
            events: None,
            progress,
        };
        match resumed(folder, done, records, configuration) {
            Ok(events) => board.events = Some(events),
            Err(error) => board.warn(&error),
        }
        board
    }

    fn step(&mut self, record: &StepRecord) {
        self.write(|events, _| write_step(events, record));
    }

    /// Writes to the event files, or stops writing for good: a truncated record would hide those after it.
    fn write(&mut self, what: impl FnOnce(&mut Events, &Path) -> Result<(), TrackError>) {
        if let Some(events) = &mut self.events
            && let Err(error) = what(events, &self.folder)
        {
            self.events = None;
            self.warn(&error);
        }
    }

    fn warn(&self, error: &TrackError) {
        self.progress.say(format!(
            "warning: no TensorBoard events from here on: {error}; training goes on, metrics.jsonl has every step, and the next \
             start of this run writes the events that are missing"
        ));
    }
}

impl Observer for TensorBoard {
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
        self.write(|events, folder| {
            GRIDS
                .iter()
                .try_for_each(|name| write_grid(events, folder, step, name))
        });
    }

    fn sync(&mut self) -> Result<(), TrainError> {
        self.write(|events, _| events.sync());
        Ok(())
    }
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
    use image::RgbImage;

    use super::super::super::record::fixture::record;
    use super::*;

    fn kept(folder: &Path) -> (Vec<u64>, Vec<(u64, String)>) {
        let (_, kept) = Events::open(folder, u64::MAX, "").unwrap();
        (kept.scalars, kept.pictures.into_iter().collect())
    }

    #[test]
    fn tensorboard_writes_missing_events_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let records: Vec<_> = (1..=4).map(record).collect();
        let open = |done: usize| {
            let (step, records) = (done as u64, &records[..done]);
            TensorBoard::open(folder, step, records, "a = 1\n", Progress::hidden())
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
        let open = |folder: &Path| TensorBoard::open(folder, 0, &[], "", Progress::hidden());
        let mut board = open(folder.path());
        // The grid does not exist.
        board.on_grids(1);
        assert!(board.events.is_none());
        board.step(&record(1));
        board.sync().unwrap();
        assert_eq!(kept(folder.path()), (Vec::new(), Vec::new()));
        assert!(open(&folder.path().join("gone")).events.is_none());
    }
}
