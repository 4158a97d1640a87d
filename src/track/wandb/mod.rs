//! An offline run of Weights & Biases: `wandb/offline-run-TIME-ID/`, which `wandb sync` uploads.
//!
//! `run-ID.wandb` is a log (`log`) of protocol buffers (`proto`); pictures are files beside it. A run keeps its ID for its life.

mod identity;
mod log;
mod proto;

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{EventWriter, ExistingEvents, TrackError, io};
use identity::{Identity, newest, since_1970};
use log::Records;
use proto::{Item, Record, RecordData, Timestamp};

/// Folder of the offline run in the run's folder.
const FOLDER: &str = "wandb";
/// Oldest client of W&B that reads the records used here.
const MIN_CONSUMER: &str = "0.70.0";

/// The log of a run. It is created with its first row.
#[derive(Debug)]
pub struct OfflineRun {
    /// Folder `wandb` of the run.
    folder: PathBuf,
    project: String,
    name: String,
    configuration: String,
    identity: Identity,
    log: Option<Log>,
    /// The newest step, to which pictures may still be added.
    row: Option<Row>,
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    /// End of the last row.
    position: u64,
    records: i64,
    /// The file has its last record.
    ended: bool,
}

#[derive(Debug)]
struct Row {
    step: u64,
    items: Vec<Item>,
    files: Vec<String>,
}

impl OfflineRun {
    /// Resumes the offline run in `folder` after step `done`: removes rows of later steps and truncated records. `name` and
    /// `configuration` (TOML) are recorded when the file is created.
    ///
    /// # Errors
    /// When the folder or the file can't be read or truncated.
    pub fn open(
        folder: &Path,
        project: &str,
        name: &str,
        done: u64,
        configuration: &str,
    ) -> Result<(Self, ExistingEvents), TrackError> {
        let folder = folder.join(FOLDER);
        let mut existing = ExistingEvents::default();
        let (identity, log) = match newest(&folder)? {
            None => (Identity::new(&folder), None),
            Some(identity) => {
                let path = folder.join(identity.log());
                let log = resumed(&path, done, &mut existing).map_err(io(&path))?;
                (identity, log)
            }
        };
        let run = Self {
            folder,
            project: project.to_owned(),
            name: name.to_owned(),
            configuration: configuration.to_owned(),
            identity,
            log,
            row: None,
        };
        Ok((run, existing))
    }

    /// Writes the row of the newest step, which is complete now.
    fn flush(&mut self) -> Result<(), TrackError> {
        let Some(mut row) = self.row.take() else {
            return Ok(());
        };
        let now = since_1970();
        let runtime = now.saturating_sub(Duration::from_secs(self.identity.start));
        row.items.extend([
            Item::new("_step", row.step.to_string()),
            Item::number("_timestamp", now.as_secs_f64()),
            Item::number("_runtime", runtime.as_secs_f64()),
        ]);
        let mut records = Vec::new();
        if !row.files.is_empty() {
            let files = row.files.into_iter().map(|path| proto::File { path });
            let files = files.collect();
            records.push(RecordData::Files(proto::Files { files }));
        }
        let num = i64::try_from(row.step).unwrap_or(i64::MAX);
        records.push(RecordData::Summary(proto::Summary {
            update: row.items.clone(),
        }));
        records.push(RecordData::History(proto::History {
            item: row.items,
            step: Some(proto::HistoryStep { num }),
        }));
        let mut log = match self.log.take() {
            Some(log) => log,
            None => self.create()?,
        };
        log.write(records)?;
        self.log = Some(log);
        Ok(())
    }

    fn create(&self) -> Result<Log, TrackError> {
        let path = self.folder.join(self.identity.log());
        let parent = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(parent.join("files")).map_err(io(parent))?;
        let mut options = File::options();
        let file = options.append(true).create(true).open(&path);
        let file = file.map_err(io(&path))?;
        file.set_len(0).map_err(io(&path))?;
        let mut log = Log {
            file,
            path,
            position: 0,
            records: 0,
            ended: false,
        };
        let version = proto::Version {
            producer: concat!("coffey ", env!("CARGO_PKG_VERSION")).to_owned(),
            min_consumer: MIN_CONSUMER.to_owned(),
        };
        let run = proto::Run {
            id: self.identity.id.clone(),
            project: self.project.clone(),
            config: Some(config(&self.configuration)),
            display_name: self.name.clone(),
            start_time: Some(Timestamp::from(Duration::from_secs(self.identity.start))),
        };
        let header = proto::Header {
            version: Some(version),
        };
        log.write(vec![RecordData::Header(header), RecordData::Run(run)])?;
        Ok(log)
    }
}

impl EventWriter for OfflineRun {
    fn clear(&mut self) -> Result<(), TrackError> {
        self.row = None;
        match self.log.take() {
            Some(log) => fs::remove_file(&log.path).map_err(io(&log.path)),
            None => Ok(()),
        }
    }

    fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), TrackError> {
        self.flush()?;
        let numbers = values.iter().map(|(key, value)| Item::number(key, *value));
        self.row = Some(Row {
            step,
            items: numbers.collect(),
            files: Vec::new(),
        });
        Ok(())
    }

    /// Adds the picture to the step's row; only the newest step takes pictures, since W&B refuses rows of earlier steps.
    fn picture(
        &mut self,
        step: u64,
        tag: &str,
        (width, height): (u32, u32),
        png: Vec<u8>,
    ) -> Result<(), TrackError> {
        let Some(row) = self.row.as_mut().filter(|row| row.step == step) else {
            return Ok(());
        };
        let sha256 = format!("{:x}", Sha256::digest(&png));
        let file = format!("media/images/{tag}_{step}_{}.png", &sha256[..20]);
        let path = self
            .folder
            .join(self.identity.folder())
            .join("files")
            .join(&file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io(parent))?;
        }
        fs::write(&path, &png).map_err(io(&path))?;
        let value = serde_json::json!({
            "_type": "image-file",
            "path": file,
            "sha256": sha256,
            "size": png.len(),
            "width": width,
            "height": height,
            "format": "png",
        });
        row.items.push(Item::new(tag, value.to_string()));
        row.files.push(file);
        Ok(())
    }

    /// The newest row is not written before the next one begins: pictures may follow.
    fn sync(&mut self) -> Result<(), TrackError> {
        match &self.log {
            Some(log) => log.file.sync_data().map_err(io(&log.path)),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<Option<PathBuf>, TrackError> {
        self.flush()?;
        let Some(log) = &mut self.log else {
            return Ok(None);
        };
        if !log.ended {
            let runtime = since_1970().as_secs().saturating_sub(self.identity.start);
            let runtime = i32::try_from(runtime).unwrap_or(i32::MAX);
            let rows = log.position;
            log.write(vec![RecordData::Exit(proto::Exit { code: 0, runtime })])?;
            (log.position, log.ended) = (rows, true);
        }
        self.sync()?;
        Ok(Some(Path::new(FOLDER).join(self.identity.folder())))
    }
}

impl Log {
    /// Appends records after the last row, in one write.
    fn write(&mut self, records: Vec<RecordData>) -> Result<(), TrackError> {
        if self.ended {
            self.file.set_len(self.position).map_err(io(&self.path))?;
            self.ended = false;
        }
        let mut bytes = Vec::new();
        if self.position == 0 {
            bytes.extend(log::HEADER);
        }
        for data in records {
            self.records += 1;
            let record = Record {
                num: self.records,
                data: Some(data),
            };
            log::append(&record.encode_to_vec(), self.position, &mut bytes);
        }
        self.file.write_all(&bytes).map_err(io(&self.path))?;
        self.position += bytes.len() as u64;
        // The client's mark of an uploaded file, which it then passes over.
        match fs::remove_file(self.path.with_extension("wandb.synced")) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io(&self.path)(error)),
            _ => Ok(()),
        }
    }
}

/// A value of W&B's configuration for each table of `configuration`.
fn config(configuration: &str) -> proto::ConfigRecord {
    let tables: toml::Table = toml::from_str(configuration).unwrap_or_default();
    let item = |(key, value): (&String, &toml::Value)| {
        Some(Item::new(key, serde_json::to_string(value).ok()?))
    };
    proto::ConfigRecord {
        update: tables.iter().filter_map(item).collect(),
    }
}

/// Opens a log after its rows up to step `done` and removes later ones; `None` if the file has no such row.
fn resumed(path: &Path, done: u64, existing: &mut ExistingEvents) -> std::io::Result<Option<Log>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    let Some(mut records) = Records::new(&bytes) else {
        return Ok(None);
    };
    let (mut count, mut kept, mut position, mut ended) = (0, 0, 0, false);
    while let Some(record) = records.next_whole() {
        let Ok(Record { data, .. }) = Record::decode(record.as_slice()) else {
            break;
        };
        count += 1;
        match data {
            Some(RecordData::History(row)) => {
                let step = row.step.map_or(0, |step| step.num);
                let Some(step) = u64::try_from(step).ok().filter(|step| *step <= done) else {
                    break;
                };
                existing.scalars.push(step);
                let pictures = row.item.iter().filter(|item| item.json.starts_with('{'));
                let pictures = pictures.map(|item| (step, item.key.clone()));
                existing.pictures.extend(pictures);
                (kept, position) = (count, records.position());
            }
            Some(RecordData::Exit(_)) => {
                ended = records.position() == bytes.len() as u64;
                break;
            }
            _ => {}
        }
    }
    if position == 0 {
        return Ok(None);
    }
    let file = File::options().append(true).open(path)?;
    if !ended {
        file.set_len(position)?;
    }
    Ok(Some(Log {
        path: path.to_owned(),
        file,
        position,
        records: kept,
        ended,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, done: u64) -> (OfflineRun, ExistingEvents) {
        OfflineRun::open(folder, "lcm", "run", done, "[train]\nseed = 7\n").unwrap()
    }

    fn resume(folder: &Path, done: u64, to: u64) -> (OfflineRun, ExistingEvents) {
        let (mut run, existing) = open(folder, done);
        for step in done + 1..=to {
            run.scalars(step, &[("loss", 0.5 / step as f64)]).unwrap();
            if step % 2 == 0 {
                run.picture(step, "validation/target", (3, 2), vec![7; 70_000])
                    .unwrap();
            }
        }
        (run, existing)
    }

    fn records(run: &OfflineRun) -> Vec<Record> {
        let bytes = fs::read(run.folder.join(run.identity.log())).unwrap();
        let mut records = Records::new(&bytes).unwrap();
        let contents = std::iter::from_fn(|| records.next_whole());
        let decoded = contents.map(|content| Record::decode(content.as_slice()).unwrap());
        let decoded = decoded.collect();
        assert_eq!(records.position(), bytes.len() as u64);
        decoded
    }

    fn rows(run: &OfflineRun) -> Vec<i64> {
        let step = |record: &Record| match &record.data {
            Some(RecordData::History(row)) => Some(row.step.as_ref().unwrap().num),
            _ => None,
        };
        records(run).iter().filter_map(step).collect()
    }

    #[test]
    fn resume_removes_later_rows_and_keeps_the_id() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (mut run, existing) = resume(folder, 0, 5);
        assert_eq!(existing, ExistingEvents::default());
        run.sync().unwrap();
        // The row of step 5 may still get pictures.
        assert_eq!(rows(&run), [1, 2, 3, 4]);
        drop(run);
        let (mut run, existing) = resume(folder, 3, 6);
        assert_eq!(existing.scalars, [1, 2, 3]);
        let tag = "validation/target".to_owned();
        assert_eq!(existing.pictures, [(2, tag)].into());
        let ended = run.finish().unwrap().unwrap();
        assert!(
            folder
                .join(&ended)
                .join("files/media/images/validation")
                .is_dir()
        );
        assert_eq!(rows(&run), [1, 2, 3, 4, 5, 6]);
        let numbers = records(&run).into_iter().map(|record| record.num);
        assert!(numbers.eq(1..=records(&run).len() as i64));
        // A resume of a finished run changes nothing; a further step replaces the last record.
        let whole = records(&run);
        let (mut run, existing) = open(folder, 6);
        assert_eq!(existing.scalars, [1, 2, 3, 4, 5, 6]);
        run.finish().unwrap();
        assert_eq!(records(&run), whole);
        let mark = folder
            .join(&ended)
            .join(format!("run-{}.wandb.synced", run.identity.id));
        fs::write(&mark, "").unwrap();
        let (mut run, _) = resume(folder, 6, 7);
        assert_eq!(run.finish().unwrap(), Some(ended));
        assert!(!mark.exists());
        assert_eq!(rows(&run), [1, 2, 3, 4, 5, 6, 7]);
        assert!(matches!(
            records(&run).last().unwrap().data,
            Some(RecordData::Exit(_))
        ));
        // A start from step 0 writes the file anew.
        let (mut run, existing) = resume(folder, 0, 1);
        assert_eq!(existing, ExistingEvents::default());
        run.finish().unwrap();
        assert_eq!(rows(&run), [1]);
    }

    #[test]
    fn numbers_that_are_not_finite_are_written_as_the_client_does() {
        for (value, json) in [
            (f64::NAN, "NaN"),
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
            (1e-6, "1e-6"),
        ] {
            assert_eq!(Item::number("loss", value).json, json);
        }
    }
}
