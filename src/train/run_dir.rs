//! The output of a run: a folder, or a prefix in S3 with a local folder for files that grow step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use coffey_pipeline::{Destination, SourceError, regular_file};
use sha2::{Digest, Sha256};

use super::checkpoint::CheckpointStore;
use super::lock::{FolderLock, LOCK, LockWait, PrefixLock, check_prefix_free};
use super::{TrainError, io};
use crate::config::{Config, in_s3};

/// The output of a run, locked by this process.
#[derive(Debug)]
pub struct RunDir {
    /// Folder or `s3://` prefix, as configured.
    place: PathBuf,
    /// Local folder of the records.
    folder: PathBuf,
    remote: Option<Destination>,
    /// Remove the local folder when the run is done.
    temporary: bool,
    /// The lock of a prefix in S3; `None` for a folder, or if the server has none.
    prefix_lock: Option<Arc<PrefixLock>>,
    /// Locked while this process writes to the folder.
    _lock: FolderLock,
}

impl RunDir {
    /// Locks the output for this process. A server without conditional writes has no lock: `wait.say` says so.
    ///
    /// # Errors
    /// [`TrainError::Mismatch`] if another process holds the lock, else why the folder can't be used.
    pub fn open(
        config: &Config,
        place: &Path,
        destination: impl FnOnce(&str) -> Result<Destination, SourceError>,
        wait: LockWait<'_>,
    ) -> Result<Self, TrainError> {
        if !in_s3(place) {
            check_entries(place)?;
            return Ok(Self {
                place: place.to_owned(),
                folder: place.to_owned(),
                remote: None,
                temporary: false,
                prefix_lock: None,
                _lock: FolderLock::acquire(place, place, wait)?,
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
        let lock = FolderLock::acquire(&folder, place, wait)?;
        let remote = destination(&name)?;
        let prefix_lock = PrefixLock::acquire(&remote, place, wait)?.map(Arc::new);
        if prefix_lock.is_none() {
            (wait.say)(format!(
                "warning: {name}: the server has no conditional writes, so this output is not locked: no second run may write to it"
            ));
        }
        // S3 holds the run. Local files of a killed run may be newer: its steps are made again.
        empty(&folder)?;
        Ok(Self {
            place: place.to_owned(),
            remote: Some(remote),
            folder,
            temporary,
            prefix_lock,
            _lock: lock,
        })
    }

    /// Fails if another process is training into `place`; changes nothing.
    ///
    /// # Errors
    /// As [`RunDir::open`].
    pub fn check_free(
        place: &Path,
        destination: impl FnOnce(&str) -> Result<Destination, SourceError>,
    ) -> Result<(), TrainError> {
        if in_s3(place) {
            return check_prefix_free(&destination(&place.to_string_lossy())?, place);
        }
        FolderLock::check_free(place, place)
    }

    /// The lock of a prefix in S3, which another process may take over.
    pub(super) fn prefix_lock(&self) -> Option<&Arc<PrefixLock>> {
        self.prefix_lock.as_ref()
    }

    /// Folder or `s3://` prefix, for messages.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Local folder that records and pictures are written to.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn checkpoints(&self, keep: usize) -> CheckpointStore {
        match &self.remote {
            None => CheckpointStore::in_folder(&self.folder, keep),
            Some(remote) => CheckpointStore::remote(remote.clone(), &self.folder, keep),
        }
    }

    pub(super) fn records(&self) -> RunRecords {
        RunRecords {
            folder: self.folder.clone(),
            remote: self.remote.clone(),
            uploaded: Mutex::default(),
        }
    }

    /// Ends the run: everything is at its destination.
    pub(super) fn close(self) {
        if self.temporary && self.remote.is_some() {
            // A temporary folder; leaving it behind is harmless.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Refuses a folder with a named pipe or a device, which would stop the run where it is opened.
fn check_entries(folder: &Path) -> Result<(), TrainError> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry.map_err(io(folder))?.path();
        regular_file::check_file_or_folder(&path)
            .map_err(|error| TrainError::Mismatch(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

/// Removes everything but the lock.
fn empty(folder: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let entry = entry.map_err(io(folder))?;
        let path = entry.path();
        if entry.file_name() == LOCK {
            continue;
        }
        let removed = if entry.file_type().map_err(io(&path))?.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(io(&path))?;
    }
    Ok(())
}

/// Files of a run besides models: metrics, pictures, its description. They are uploaded to S3 with each checkpoint.
#[derive(Debug)]
pub(super) struct RunRecords {
    folder: PathBuf,
    remote: Option<Destination>,
    /// Versions of the local files that were uploaded.
    uploaded: Mutex<BTreeMap<String, Version>>,
}

/// Size and modification time of a file.
type Version = (u64, Option<SystemTime>);

fn version(path: &Path) -> std::io::Result<Version> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.len(), metadata.modified().ok()))
}

impl RunRecords {
    /// Downloads the records of a run in S3. Pictures of samples are not downloaded: they are never read.
    pub(super) fn fetch(&self) -> Result<(), TrainError> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        for entry in remote.list("")? {
            if !is_record(&entry.name) {
                continue;
            }
            let path = self.folder.join(&entry.name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(io(parent))?;
            }
            let mut from = remote.open(&entry.name)?;
            let mut to = File::create(&path).map_err(io(&path))?;
            std::io::copy(&mut from, &mut to).map_err(|error| remote.failed(&entry.name, error))?;
            let now = version(&path).map_err(io(&path))?;
            self.uploaded().insert(entry.name, now);
        }
        Ok(())
    }

    /// Uploads changed files and removes deleted ones. A file that grows meanwhile may be uploaded with an incomplete last line, of
    /// a step after the checkpoint's.
    pub(super) fn upload(&self) -> Result<(), TrainError> {
        let Some(remote) = &self.remote else {
            return Ok(());
        };
        let local = Destination::folder(&self.folder);
        let here = local.list("")?;
        for entry in here.iter().filter(|entry| !is_hidden(&entry.name)) {
            let path = self.folder.join(&entry.name);
            let Ok(now) = version(&path) else {
                continue; // removed since it was listed
            };
            if self.uploaded().get(&entry.name) == Some(&now) {
                continue;
            }
            let mut from = local.open(&entry.name)?;
            let mut to = remote.create(&entry.name)?;
            std::io::copy(&mut from, &mut to).map_err(|e| remote.failed(&entry.name, e))?;
            to.finish()?;
            self.uploaded().insert(entry.name.clone(), now);
        }
        let gone: Vec<String> = {
            let names: BTreeSet<&str> = here.iter().map(|entry| entry.name.as_str()).collect();
            let uploaded = self.uploaded();
            let gone = uploaded
                .keys()
                .filter(|name| !names.contains(name.as_str()));
            gone.cloned().collect()
        };
        for name in gone {
            remote.remove(&name)?;
            self.uploaded().remove(&name);
        }
        Ok(())
    }

    fn uploaded(&self) -> MutexGuard<'_, BTreeMap<String, Version>> {
        self.uploaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether an object of this name under a run's prefix is one of its records.
fn is_record(name: &str) -> bool {
    let endings = [".jsonl", ".json", ".toml", ".png"];
    let known = endings.iter().any(|ending| name.ends_with(ending));
    let record = (known || name.starts_with("events.out.tfevents.")) && !name.contains('/');
    let offline_run = name.starts_with("wandb/") && name.ends_with(".wandb");
    (record || offline_run) && !is_hidden(name)
}

/// Whether a file is a lock, or is being written or fetched.
fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.'))
}
