//! TensorBoard's event files: records with checksums (`record`), each with one protocol buffer (`event`).

mod event;
mod record;

use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use event::{Event, EventData};
use prost::Message as _;
use record::RecordReader;

use super::{EventWriter, ExistingEvents, TrackError, io};

/// Start of an event file's name, for TensorBoard; seconds since 1970 and [`SUFFIX`] follow.
const PREFIX: &str = "events.out.tfevents.";
/// End of the names of coffey's event files. Files of other writers are not touched.
const SUFFIX: &str = ".coffey";
/// The tag of the configuration.
const CONFIGURATION: &str = "configuration";

/// The event files of a run. Each process writes one file, created with its first event.
#[derive(Debug)]
pub struct TensorBoard {
    folder: PathBuf,
    configuration: String,
    /// First step of this process.
    first: u64,
    open: Option<(PathBuf, File)>,
}

impl TensorBoard {
    /// Resumes in `folder` after step `done`: removes events of later steps and truncated records. `configuration` (TOML) is
    /// recorded with the first event.
    ///
    /// # Errors
    /// When the folder or a file can't be read or truncated.
    pub fn open(
        folder: &Path,
        done: u64,
        configuration: &str,
    ) -> Result<(Self, ExistingEvents), TrackError> {
        let mut existing = ExistingEvents::default();
        for path in files(folder)? {
            truncate(&path, done, &mut existing).map_err(io(&path))?;
        }
        let events = Self {
            folder: folder.to_owned(),
            configuration: configuration.to_owned(),
            first: done + 1,
            open: None,
        };
        Ok((events, existing))
    }

    fn write(&mut self, event: &Event) -> Result<(), TrackError> {
        let mut bytes = Vec::new();
        if self.open.is_none() {
            self.open = Some(self.create()?);
            for event in [
                Event::version(),
                // A running TensorBoard then discards these steps of earlier files.
                Event::start(self.first),
                Event::text(self.first, CONFIGURATION, &code_block(&self.configuration)),
            ] {
                record::frame(&event.encode_to_vec(), &mut bytes);
            }
        }
        record::frame(&event.encode_to_vec(), &mut bytes);
        match &mut self.open {
            // Unbuffered: readers see every step at once, and a kill loses none.
            Some((path, file)) => file.write_all(&bytes).map_err(io(path)),
            None => Ok(()),
        }
    }

    /// Creates a file whose name sorts after all others: TensorBoard reads files in that order.
    fn create(&self) -> Result<(PathBuf, File), TrackError> {
        let newest = files(&self.folder)?.iter().filter_map(|f| seconds(f)).max();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let number = newest.map_or(now, |newest| now.max(newest + 1));
        let path = self.folder.join(format!("{PREFIX}{number:010}{SUFFIX}"));
        let file = File::create_new(&path).map_err(io(&path))?;
        Ok((path, file))
    }
}

impl EventWriter for TensorBoard {
    fn clear(&mut self) -> Result<(), TrackError> {
        self.open = None;
        self.first = 1;
        for path in files(&self.folder)? {
            fs::remove_file(&path).map_err(io(&path))?;
        }
        Ok(())
    }

    /// Writes all scalars in one record.
    fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), TrackError> {
        self.write(&Event::scalars(step, values))
    }

    fn picture(
        &mut self,
        step: u64,
        tag: &str,
        size: (u32, u32),
        png: Vec<u8>,
    ) -> Result<(), TrackError> {
        self.write(&Event::image(step, tag, size, png))
    }

    fn sync(&mut self) -> Result<(), TrackError> {
        match &self.open {
            Some((path, file)) => file.sync_data().map_err(io(path)),
            None => Ok(()),
        }
    }
}

/// Markdown code block.
fn code_block(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// The number in the name of one of coffey's event files.
fn seconds(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(PREFIX)?
        .strip_suffix(SUFFIX)?
        .parse()
        .ok()
}

/// Coffey's event files in a folder, in the order of writing.
fn files(folder: &Path) -> Result<Vec<PathBuf>, TrackError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        if seconds(&path).is_some() {
            files.push(path);
        }
    }
    files.sort_by_key(|path| seconds(path));
    Ok(files)
}

/// Truncates a file after its events up to step `done`; removes a file without summaries.
fn truncate(path: &Path, done: u64, existing: &mut ExistingEvents) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut records = RecordReader::new(BufReader::new(&file), length);
    let (mut end, mut has_summary) = (0, false);
    while let Some(record) = records.next_whole()? {
        let Ok(event) = Event::decode(record) else {
            break;
        };
        let Ok(step) = u64::try_from(event.step) else {
            break;
        };
        if step > done {
            break;
        }
        if let Some(EventData::Summary(summary)) = event.data {
            has_summary = true;
            if summary.is_scalars() {
                existing.scalars.push(step);
            }
            let tags = summary.image_tags().map(|tag| (step, tag.to_owned()));
            existing.pictures.extend(tags);
        }
        end = records.position();
    }
    if !has_summary {
        fs::remove_file(path)
    } else if end < length {
        file.set_len(end)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Step and kind of every event in a folder.
    fn recorded(folder: &Path) -> Vec<(i64, String)> {
        let mut found = Vec::new();
        for path in files(folder).unwrap() {
            let bytes = fs::read(&path).unwrap();
            let mut records = RecordReader::new(bytes.as_slice(), bytes.len() as u64);
            while let Some(record) = records.next_whole().unwrap() {
                let event = Event::decode(record).unwrap();
                let kind = match event.data.unwrap() {
                    EventData::FileVersion(version) => version,
                    EventData::SessionLog(_) => "start".to_owned(),
                    EventData::Summary(summary) => {
                        let tags: Vec<_> = summary.value.iter().map(|v| v.tag.as_str()).collect();
                        tags.join(" ")
                    }
                };
                found.push((event.step, kind));
            }
            assert_eq!(records.position(), bytes.len() as u64, "{}", path.display());
        }
        found
    }

    fn steps(folder: &Path, name: &str) -> Vec<i64> {
        let events = recorded(folder);
        let named = events.iter().filter(|(_, kind)| kind.starts_with(name));
        named.map(|(step, _)| *step).collect()
    }

    fn resume(folder: &Path, done: u64, to: u64) -> ExistingEvents {
        let (mut events, existing) = TensorBoard::open(folder, done, "a = 1\n").unwrap();
        for step in done + 1..=to {
            let values = [("loss", 0.5 / step as f64), ("lr", 1e-6)];
            events.scalars(step, &values).unwrap();
            if step % 2 == 0 {
                events
                    .picture(step, "validation/target", (3, 2), vec![7; 2000])
                    .unwrap();
            }
        }
        events.sync().unwrap();
        existing
    }

    #[test]
    fn event_file_appears_with_the_first_event() {
        let folder = tempfile::tempdir().unwrap();
        let (mut events, existing) = TensorBoard::open(folder.path(), 0, "a = 1\n").unwrap();
        events.sync().unwrap();
        assert_eq!(existing, ExistingEvents::default());
        assert_eq!(files(folder.path()).unwrap(), Vec::<PathBuf>::new());
        events.scalars(1, &[("loss", 0.5)]).unwrap();
        let expected = [
            (0, "brain.Event:2"),
            (1, "start"),
            (1, "configuration"),
            (1, "loss"),
        ];
        let expected = expected.map(|(step, kind)| (step, kind.to_owned()));
        assert_eq!(recorded(folder.path()), expected);
        assert_eq!(files(folder.path()).unwrap().len(), 1);
    }

    #[test]
    fn resume_removes_later_and_truncated_events() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(
            folder.join("events.out.tfevents.1.other"),
            "of another writer",
        )
        .unwrap();
        resume(folder, 0, 5);
        // Killed within the last record; resumed from step 3.
        let newest = files(folder).unwrap().pop().unwrap();
        let length = fs::metadata(&newest).unwrap().len();
        File::options()
            .write(true)
            .open(&newest)
            .unwrap()
            .set_len(length - 3)
            .unwrap();
        let existing = resume(folder, 3, 6);
        assert_eq!(existing.scalars, [1, 2, 3]);
        let pictures: Vec<_> = existing.pictures.iter().map(|(step, _)| *step).collect();
        assert_eq!(pictures, [2]);
        assert_eq!(steps(folder, "loss"), [1, 2, 3, 4, 5, 6]);
        assert_eq!(steps(folder, "validation"), [2, 4, 6]);
        assert_eq!(steps(folder, "configuration"), [1, 4]);
        // Two resumes from the same step, perhaps in the same second: the first one's file is removed.
        resume(folder, 3, 4);
        resume(folder, 4, 5);
        assert_eq!(steps(folder, "loss"), [1, 2, 3, 4, 5]);
        assert_eq!(steps(folder, "configuration"), [1, 4, 5]);
        // A resume without later events removes nothing.
        assert_eq!(resume(folder, 5, 5).scalars, [1, 2, 3, 4, 5]);
        assert_eq!(files(folder).unwrap().len(), 3);
        // A start from step 0 removes all of coffey's files.
        assert_eq!(resume(folder, 0, 1), ExistingEvents::default());
        assert_eq!(steps(folder, "loss"), [1]);
        assert!(folder.join("events.out.tfevents.1.other").is_file());
    }

    #[test]
    fn resume_truncates_at_a_damaged_byte() {
        let folder = tempfile::tempdir().unwrap();
        resume(folder.path(), 0, 4);
        let path = files(folder.path()).unwrap().pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        // Within the picture of step 2.
        bytes[1500] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (mut events, existing) = TensorBoard::open(folder.path(), 4, "").unwrap();
        assert_eq!(existing.scalars, [1, 2]);
        assert!(existing.pictures.is_empty());
        events.clear().unwrap();
        events.scalars(1, &[("loss", 1.0)]).unwrap();
        assert_eq!(steps(folder.path(), "loss"), [1]);
        assert_eq!(steps(folder.path(), "start"), [1]);
    }

    #[test]
    fn track_error_names_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        let error = TensorBoard::open(&gone, 0, "").unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
        let (mut events, _) = TensorBoard::open(folder.path(), 0, "").unwrap();
        events.folder = gone;
        assert!(events.scalars(1, &[("loss", 1.0)]).is_err());
    }
}
