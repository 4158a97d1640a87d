//! Where a run leaves what it makes: a folder, or a prefix in S3 with a folder on this machine for what grows step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use coffey_pipeline::Destination;
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoints;
use super::data::Data;
use super::{TrainError, io};
use crate::config::{Config, in_s3};

/// A run's output, held by this process.
#[derive(Debug)]
pub(super) struct Output {
    /// As configured.
    place: PathBuf,
    /// Where the records are.
    folder: PathBuf,
    remote: Option<Destination>,
    /// Whether the folder goes when the run is done.
    temporary: bool,
    /// Held while this process writes there.
    _lock: File,
}

impl Output {
    /// Takes the output for this process. In S3 there is no such lock: that two runs never share a prefix is the user's to see to.
    pub(super) fn open(config: &Config, place: &Path, data: &Data<'_>) -> Result<Self, TrainError> {
        if !in_s3(place) {
            fs::create_dir_all(place).map_err(io(place))?;
            return Ok(Self {
                place: place.to_owned(),
                folder: place.to_owned(),
                remote: None,
                temporary: false,
                _lock: lock(place, place)?,
            });
        }
        let name = place.to_string_lossy();
        let server = config.s3.endpoint_url.as_deref().unwrap_or_default();
        let hash = Sha256::digest(format!("{server}\n{}", name.trim_end_matches('/')));
        let hash: String = hash.iter().take(8).map(|b| format!("{b:02x}")).collect();
        let scratch = config.train.scratch.clone();
        let temporary = scratch.is_none();
        let folder = scratch
            .unwrap_or_else(std::env::temp_dir)
            .join(format!("coffey-{hash}"));
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let lock = lock(&folder, place)?;
        // What counts is in S3; what a killed run left here may be newer, and its steps are made again.
        empty(&folder)?;
        Ok(Self {
            place: place.to_owned(),
            remote: Some((data.destination)(&name)?),
            folder,
            temporary,
            _lock: lock,
        })
    }

    /// As configured, for messages.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Where records and pictures are written.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn checkpoints(&self, keep: usize) -> Checkpoints {
        match &self.remote {
            None => Checkpoints::in_folder(&self.folder, keep),
            Some(remote) => Checkpoints::remote(remote.clone(), &self.folder, keep),
        }
    }

    pub(super) fn records(&self) -> Records {
        Records {
            folder: self.folder.clone(),
            remote: self.remote.clone(),
            there: Mutex::default(),
        }
    }

    /// The run is done, and everything is where it belongs.
    pub(super) fn close(self) {
        if self.temporary && self.remote.is_some() {
            let _stays = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Takes a folder for this process, until the file is closed: two runs in one folder would destroy each other's checkpoints.
fn lock(folder: &Path, place: &Path) -> Result<File, TrainError> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(io(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(TrainError::Mismatch(format!(
            "{}: another process is training into this folder",
            place.display()
        ))),
        Err(TryLockError::Error(source)) => Err(io(&path)(source)),
    }
}

const LOCK: &str = ".lock";

/// Removes everything but the lock.
fn empty(folder: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let entry = entry.map_err(io(folder))?;
        let path = entry.path();
        if entry.file_name() == LOCK {
            continue;
        }
        match entry.file_type().map_err(io(&path))?.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        }
        .map_err(io(&path))?;
    }
    Ok(())
}

/// What a run writes besides models: metrics, pictures, its description. In S3 they are uploaded with each checkpoint.
#[derive(Debug)]
pub(super) struct Records {
    folder: PathBuf,
    remote: Option<Destination>,
    /// What is in S3, as it was here then.
    there: Mutex<BTreeMap<String, Version>>,
}

/// A file's size and time.
type Version = (u64, Option<SystemTime>);

fn version(path: &Path) -> std::io::Result<Version> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.len(), metadata.modified().ok()))
}

impl Records {
    /// Brings the records of a run in S3 here, as its last checkpoint or a later moment left them. Pictures of samples stay there:
    /// they are never read.
    pub(super) fn fetch(&self) -> Result<(), TrainError> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        for entry in remote.list("")? {
            if !is_record(&entry.name) {
                continue;
            }
            let path = self.folder.join(&entry.name);
            let content = remote.read(&entry.name)?;
            fs::write(&path, content).map_err(io(&path))?;
            let now = version(&path).map_err(io(&path))?;
            self.there().insert(entry.name, now);
        }
        Ok(())
    }

    /// Uploads what has changed, and removes what is no longer here. A file that grows meanwhile may be uploaded with a line that is
    /// not whole yet, of a step after the checkpoint's.
    pub(super) fn upload(&self) -> Result<(), TrainError> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        let local = Destination::folder(&self.folder);
        let here = local.list("")?;
        for entry in here.iter().filter(|entry| !is_hidden(&entry.name)) {
            let path = self.folder.join(&entry.name);
            let Ok(now) = version(&path) else {
                continue; // gone since it was listed
            };
            if self.there().get(&entry.name) == Some(&now) {
                continue;
            }
            let mut from = local.open(&entry.name)?;
            let mut to = remote.create(&entry.name)?;
            std::io::copy(&mut from, &mut to).map_err(|e| remote.failed(&entry.name, e))?;
            to.finish()?;
            self.there().insert(entry.name.clone(), now);
        }
        let gone: Vec<String> = {
            let names: BTreeSet<&str> = here.iter().map(|entry| entry.name.as_str()).collect();
            let there = self.there();
            let gone = there.keys().filter(|name| !names.contains(name.as_str()));
            gone.cloned().collect()
        };
        for name in gone {
            remote.remove(&name)?;
            self.there().remove(&name);
        }
        Ok(())
    }

    fn there(&self) -> MutexGuard<'_, BTreeMap<String, Version>> {
        self.there.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an object under a run's prefix is one of its records.
fn is_record(name: &str) -> bool {
    let endings = [".jsonl", ".json", ".toml", ".png"];
    let known = endings.iter().any(|ending| name.ends_with(ending));
    (known || name.starts_with("events.out.tfevents.")) && !name.contains('/') && !is_hidden(name)
}

/// Locks, files that are being written, what is being fetched.
fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.'))
}
