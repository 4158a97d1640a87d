//! TensorBoard's event files: records framed by checksums (`record`), each holding one protocol buffer (`event`).
//!
//! [`Events`] writes the files of a run and cuts them back when it goes on from an earlier step, so that a folder read as a
//! whole holds every step once. It never decides what is recorded.

mod event;
mod record;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use event::{Event, What};
use prost::Message as _;
use record::Records;

/// What TensorBoard knows an event file by; seconds since 1970 follow, and after them [`SUFFIX`].
const PREFIX: &str = "events.out.tfevents.";
/// What tells these files from those of other writers, which are left alone.
const SUFFIX: &str = ".coffey";
/// The tag of the configuration.
const CONFIGURATION: &str = "configuration";

/// Why an event file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct TrackError {
    /// The file or folder.
    pub path: PathBuf,
    /// The cause.
    pub source: std::io::Error,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> TrackError {
    let path = path.to_owned();
    move |source| TrackError { path, source }
}

/// What the files of a folder hold after they were cut back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The steps that have scalars, in the order of the files.
    pub scalars: Vec<u64>,
    /// The pictures: step and tag.
    pub pictures: BTreeSet<(u64, String)>,
}

/// The event files of a run. A process writes one file, which appears with the first event.
#[derive(Debug)]
pub struct Events {
    folder: PathBuf,
    configuration: String,
    /// The first step this process makes.
    first: u64,
    open: Option<(PathBuf, File)>,
}

impl Events {
    /// Goes on in `folder` after step `done`: what the files hold of later steps, and what a crash left half written, is cut
    /// off. `configuration`, a TOML text, is recorded with the first event.
    ///
    /// # Errors
    /// When the folder or one of the files can't be read or shortened.
    pub fn open(folder: &Path, done: u64, configuration: &str) -> Result<(Self, Kept), TrackError> {
        let mut kept = Kept::default();
        for path in files(folder)? {
            cut(&path, done, &mut kept).map_err(io(&path))?;
        }
        let events = Self {
            folder: folder.to_owned(),
            configuration: configuration.to_owned(),
            first: done + 1,
            open: None,
        };
        Ok((events, kept))
    }

    /// Removes what earlier processes wrote, so that all of it can be written anew.
    ///
    /// # Errors
    /// When a file can't be removed.
    pub fn clear(&mut self) -> Result<(), TrackError> {
        self.open = None;
        self.first = 1;
        for path in files(&self.folder)? {
            fs::remove_file(&path).map_err(io(&path))?;
        }
        Ok(())
    }

    /// Records numbers of a step, all of them or none.
    ///
    /// # Errors
    /// When the file can't be written; what follows a record that was cut off is not read, so nothing more should be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), TrackError> {
        self.write(&Event::scalars(step, values))
    }

    /// Records a picture, a PNG of `width` by `height` pixels.
    ///
    /// # Errors
    /// As [`Events::scalars`].
    pub fn picture(
        &mut self,
        step: u64,
        tag: &str,
        (width, height): (u32, u32),
        png: Vec<u8>,
    ) -> Result<(), TrackError> {
        self.write(&Event::picture(step, tag, (width, height), png))
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// When it does not get there.
    pub fn sync(&self) -> Result<(), TrackError> {
        match &self.open {
            Some((path, file)) => file.sync_data().map_err(io(path)),
            None => Ok(()),
        }
    }

    fn write(&mut self, event: &Event) -> Result<(), TrackError> {
        let mut bytes = Vec::new();
        if self.open.is_none() {
            self.open = Some(self.create()?);
            for event in [
                Event::version(),
                // A TensorBoard that is open meanwhile forgets what it has seen of these steps.
                Event::start(self.first),
                Event::text(self.first, CONFIGURATION, &code_block(&self.configuration)),
            ] {
                record::frame(&event.encode_to_vec(), &mut bytes);
            }
        }
        record::frame(&event.encode_to_vec(), &mut bytes);
        match &mut self.open {
            // At once: whoever looks on sees the step, and a kill takes none that was made.
            Some((path, file)) => file.write_all(&bytes).map_err(io(path)),
            None => Ok(()),
        }
    }

    /// A file that comes after all others by its name, as TensorBoard reads them in that order.
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

/// Markdown that shows a text as it is.
fn code_block(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

/// The number in a file's name, if it is one of ours.
fn seconds(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(PREFIX)?
        .strip_suffix(SUFFIX)?
        .parse()
        .ok()
}

/// Our event files in a folder, in the order they were written.
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

/// Cuts a file back to its events up to step `done`, which come first, and removes it if nothing is left to show.
fn cut(path: &Path, done: u64, kept: &mut Kept) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut records = Records::new(BufReader::new(&file), length);
    let (mut whole, mut shows) = (0, false);
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
        if let Some(What::Summary(summary)) = event.what {
            shows = true;
            if summary.is_scalars() {
                kept.scalars.push(step);
            }
            let tags = summary.picture_tags().map(|tag| (step, tag.to_owned()));
            kept.pictures.extend(tags);
        }
        whole = records.position();
    }
    match shows {
        false => fs::remove_file(path),
        true if whole < length => file.set_len(whole),
        true => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every event of a folder: step, and what it is.
    fn told(folder: &Path) -> Vec<(i64, String)> {
        let mut told = Vec::new();
        for path in files(folder).unwrap() {
            let bytes = fs::read(&path).unwrap();
            let mut records = Records::new(bytes.as_slice(), bytes.len() as u64);
            while let Some(record) = records.next_whole().unwrap() {
                let event = Event::decode(record).unwrap();
                let what = match event.what.unwrap() {
                    What::FileVersion(version) => version,
                    What::SessionLog(_) => "start".to_owned(),
                    What::Summary(summary) => {
                        let tags: Vec<_> = summary.value.iter().map(|v| v.tag.as_str()).collect();
                        tags.join(" ")
                    }
                };
                told.push((event.step, what));
            }
            assert_eq!(records.position(), bytes.len() as u64, "{}", path.display());
        }
        told
    }

    fn steps(folder: &Path, name: &str) -> Vec<i64> {
        let told = told(folder);
        let of = told.iter().filter(|(_, what)| what.starts_with(name));
        of.map(|(step, _)| *step).collect()
    }

    fn go_on(folder: &Path, done: u64, to: u64) -> Kept {
        let (mut events, kept) = Events::open(folder, done, "a = 1\n").unwrap();
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
        kept
    }

    #[test]
    fn a_process_writes_one_file_when_there_is_something_to_write() {
        let folder = tempfile::tempdir().unwrap();
        let (mut events, kept) = Events::open(folder.path(), 0, "a = 1\n").unwrap();
        events.sync().unwrap();
        assert_eq!(kept, Kept::default());
        assert_eq!(files(folder.path()).unwrap(), Vec::<PathBuf>::new());
        events.scalars(1, &[("loss", 0.5)]).unwrap();
        let expected = [
            (0, "brain.Event:2"),
            (1, "start"),
            (1, "configuration"),
            (1, "loss"),
        ];
        let expected = expected.map(|(step, what)| (step, what.to_owned()));
        assert_eq!(told(folder.path()), expected);
        assert_eq!(files(folder.path()).unwrap().len(), 1);
    }

    #[test]
    fn going_on_cuts_later_events_and_torn_ones() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        fs::write(
            folder.join("events.out.tfevents.1.other"),
            "of another writer",
        )
        .unwrap();
        go_on(folder, 0, 5);
        // Killed within the last record, and going on from step 3.
        let newest = files(folder).unwrap().pop().unwrap();
        let length = fs::metadata(&newest).unwrap().len();
        File::options()
            .write(true)
            .open(&newest)
            .unwrap()
            .set_len(length - 3)
            .unwrap();
        let kept = go_on(folder, 3, 6);
        assert_eq!(kept.scalars, [1, 2, 3]);
        let pictures: Vec<_> = kept.pictures.iter().map(|(step, _)| *step).collect();
        assert_eq!(pictures, [2]);
        assert_eq!(steps(folder, "loss"), [1, 2, 3, 4, 5, 6]);
        assert_eq!(steps(folder, "validation"), [2, 4, 6]);
        assert_eq!(steps(folder, "configuration"), [1, 4]);
        // Twice from the same step: the second file goes, although the clock's second may be the same.
        go_on(folder, 3, 4);
        go_on(folder, 4, 5);
        assert_eq!(steps(folder, "loss"), [1, 2, 3, 4, 5]);
        assert_eq!(steps(folder, "configuration"), [1, 4, 5]);
        // A run that goes on nowhere leaves what there is.
        assert_eq!(go_on(folder, 5, 5).scalars, [1, 2, 3, 4, 5]);
        assert_eq!(files(folder).unwrap().len(), 3);
        // A run from the start begins anew.
        assert_eq!(go_on(folder, 0, 1), Kept::default());
        assert_eq!(steps(folder, "loss"), [1]);
        assert!(folder.join("events.out.tfevents.1.other").is_file());
    }

    #[test]
    fn a_damaged_byte_ends_what_is_kept_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        go_on(folder.path(), 0, 4);
        let path = files(folder.path()).unwrap().pop().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        // Within the picture of step 2.
        bytes[1500] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (mut events, kept) = Events::open(folder.path(), 4, "").unwrap();
        assert_eq!(kept.scalars, [1, 2]);
        assert!(kept.pictures.is_empty());
        events.clear().unwrap();
        events.scalars(1, &[("loss", 1.0)]).unwrap();
        assert_eq!(steps(folder.path(), "loss"), [1]);
        assert_eq!(steps(folder.path(), "start"), [1]);
    }

    #[test]
    fn a_folder_that_can_not_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        let error = Events::open(&gone, 0, "").unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
        let (mut events, _) = Events::open(folder.path(), 0, "").unwrap();
        events.folder = gone;
        assert!(events.scalars(1, &[("loss", 1.0)]).is_err());
    }
}
