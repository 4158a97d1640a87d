//! Models of the Hugging Face Hub, into the cache that Python's `huggingface_hub` uses as well.
//!
//! hf-hub does the transfer and knows the cache's layout. Here is which files, of which commit: a revision is resolved once, and
//! every file is asked for by the commit, so that a branch that moves meanwhile can't mix two versions.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::files::{self, Wanted};
use super::progress::FileProgress;
use super::{Fetched, PretrainedError, cache, io};
use crate::config::Model;
use crate::environment;
use crate::hub::Settings;

/// Tries of one request before it is given up.
const MAX_ATTEMPTS: u32 = 5;
const FIRST_DELAY: Duration = Duration::from_millis(250);

/// The Hub, as the environment says.
#[derive(Clone)]
pub(super) struct Hub {
    settings: Settings,
    cache: PathBuf,
}

/// How a request failed.
enum Fault {
    /// Repeating won't help.
    Final(PretrainedError),
    /// It may pass.
    Passing(String),
}

impl Hub {
    /// Reads what [`Settings`] reads, and `HF_HUB_CACHE`.
    pub(super) fn from_env() -> Result<Self, PretrainedError> {
        Self::new(environment::variable)
    }

    fn new(variable: impl Fn(&str) -> Option<String>) -> Result<Self, PretrainedError> {
        let settings = Settings::new(&variable)?;
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let cache = match (cache, &settings.home) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => home.join("hub"),
            (None, None) => return Err(PretrainedError::NoHome { set: "HF_HOME" }),
        };
        Ok(Self {
            settings,
            // hf-hub makes links relative to it.
            cache: std::path::absolute(&cache).map_err(io(&cache))?,
        })
    }

    /// Makes what is `wanted` of a model available in a folder.
    pub(super) fn fetch(
        &self,
        id: &str,
        revision: &str,
        wanted: &Wanted,
    ) -> Result<Fetched, PretrainedError> {
        let cached = self
            .cached_commit(id, revision)
            .map(|commit| Fetched {
                folder: self.snapshot(id, &commit),
                commit: Some(commit),
            })
            .filter(|cached| files::is_whole(wanted, &cached.folder));
        match cached {
            // A commit never changes: there is nothing to ask.
            Some(cached) if self.settings.offline || is_commit(revision) => return Ok(cached),
            None if self.settings.offline => {
                return Err(PretrainedError::Offline {
                    id: id.to_owned(),
                    revision: revision.to_owned(),
                    cache: self.cache.clone(),
                });
            }
            _ => {}
        }
        let info = match (self.info(id, revision), cached) {
            (Ok(info), _) => info,
            (Err(error @ PretrainedError::Unreachable { .. }), Some(cached))
            | (Err(error @ PretrainedError::Stalled { .. }), Some(cached)) => {
                errln!("warning: {error}; taking what the cache has of it");
                return Ok(cached);
            }
            (Err(error), _) => return Err(error),
        };
        let folder = self.fill(id, &info, wanted)?;
        if !is_commit(revision) {
            let path = self.repository(id).join("refs").join(revision);
            cache::write(&path, &info.sha)?;
        }
        Ok(Fetched {
            folder,
            commit: Some(info.sha),
        })
    }

    /// Fetches the files of a commit that are not in the cache.
    fn fill(&self, id: &str, info: &RepoInfo, wanted: &Wanted) -> Result<PathBuf, PretrainedError> {
        let not_a_model = |lacks: String| PretrainedError::NotAModel {
            model: id.to_owned(),
            lacks,
        };
        let there: BTreeSet<String> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.clone())
            .collect();
        let plan = files::plan(wanted, &there).map_err(not_a_model)?;
        let lock = self.cache.join(".locks").join(folder_name(id));
        let _turn = cache::lock(&lock.join("coffey.lock"), id)?;
        let folder = self.snapshot(id, &info.sha);
        let missing = |file: &&String| !folder.join(file).is_file();
        for file in plan.files.iter().filter(missing) {
            self.download(id, &info.sha, file)?;
        }
        for index in &plan.indexes {
            let shards = files::shards(index, &folder.join(index)).map_err(not_a_model)?;
            for shard in shards.iter().filter(missing) {
                if !there.contains(shard) {
                    return Err(not_a_model(format!("it has no {shard}")));
                }
                self.download(id, &info.sha, shard)?;
            }
        }
        Ok(folder)
    }

    fn repository(&self, id: &str) -> PathBuf {
        self.cache.join(folder_name(id))
    }

    fn snapshot(&self, id: &str, commit: &str) -> PathBuf {
        self.repository(id).join("snapshots").join(commit)
    }

    /// The commit that a revision was when it was last asked for.
    fn cached_commit(&self, id: &str, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.repository(id).join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| !commit.is_empty())
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.settings.endpoint.clone())
            .with_token(self.settings.token.as_ref().map(|t| t.secret().to_owned()))
            .with_progress(false)
            .with_user_agent("coffey", env!("CARGO_PKG_VERSION"))
            .build()
    }

    /// The commit of a revision, and its files.
    fn info(&self, id: &str, revision: &str) -> Result<RepoInfo, PretrainedError> {
        const WHAT: &str = "the list of its files";
        let ask = |revision: &str| {
            let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
            self.repeat(id, WHAT, |hub, _| {
                let repo = repo.clone();
                move || hub.api()?.repo(repo).info()
            })
        };
        let info = match ask(revision) {
            // The Hub answers a wrong name and a wrong revision alike.
            Err(PretrainedError::NoModel { .. })
                if revision != Model::MAIN && ask(Model::MAIN).is_ok() =>
            {
                return Err(PretrainedError::NoRevision {
                    id: id.to_owned(),
                    revision: revision.to_owned(),
                    endpoint: self.settings.endpoint.clone(),
                });
            }
            answer => answer?,
        };
        match is_commit(&info.sha) {
            true => Ok(info),
            false => Err(self.refused(id, WHAT, "the commit it names is none")),
        }
    }

    /// Downloads one file of a commit; the caller holds the lock.
    fn download(&self, id: &str, commit: &str, file: &str) -> Result<(), PretrainedError> {
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, commit.to_owned());
        let mut again = true;
        loop {
            let path = self.repeat(id, file, |hub, heard| {
                let progress = FileProgress::new(id, file, heard);
                let (repo, file) = (repo.clone(), file.to_owned());
                move || {
                    hub.api()?
                        .repo(repo)
                        .download_with_progress(&file, progress)
                }
            })?;
            match damage(&path) {
                Ok(None) => return Ok(()),
                // As when a proxy sends the whole file where its rest was asked for.
                Ok(Some(cause)) => {
                    let blob = fs::canonicalize(&path).map_err(io(&path))?;
                    for path in [&path, &blob] {
                        fs::remove_file(path).map_err(io(path))?;
                    }
                    if !again {
                        return Err(PretrainedError::Damaged {
                            model: id.to_owned(),
                            file: file.to_owned(),
                            cause,
                        });
                    }
                    again = false;
                }
                Err(error) => return Err(io(&path)(error)),
            }
        }
    }

    /// Makes a request until it works or the attempts are spent. `request` makes what runs on a thread of its own, since hf-hub
    /// waits for an answer without end; what arrives it counts in the number it is given.
    fn repeat<T, F>(
        &self,
        id: &str,
        what: &str,
        request: impl Fn(Self, Arc<AtomicU64>) -> F,
    ) -> Result<T, PretrainedError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let (mut attempt, mut delay) = (0, FIRST_DELAY);
        loop {
            attempt += 1;
            let heard = Arc::new(AtomicU64::new(0));
            let work = request(self.clone(), Arc::clone(&heard));
            let cause = match watched(self.settings.silence, &heard, work) {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => match self.judge(id, what, error) {
                    Fault::Final(error) => return Err(error),
                    Fault::Passing(cause) => cause,
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(PretrainedError::Stalled {
                        id: id.to_owned(),
                        endpoint: self.settings.endpoint.clone(),
                        seconds: self.settings.silence.as_secs(),
                        what: what.to_owned(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.refused(id, what, "the request ended by a fault in hf-hub"));
                }
            };
            if attempt >= MAX_ATTEMPTS {
                return Err(PretrainedError::Unreachable {
                    id: id.to_owned(),
                    endpoint: self.settings.endpoint.clone(),
                    attempts: attempt,
                    cause,
                });
            }
            std::thread::sleep(delay);
            delay *= 2;
        }
    }

    /// What an error of hf-hub means.
    fn judge(&self, id: &str, what: &str, error: ApiError) -> Fault {
        let (id_, endpoint) = (id.to_owned(), self.settings.endpoint.clone());
        let status = match &error {
            ApiError::RequestError(error) => match error.as_ref() {
                ureq::Error::StatusCode(status) => Some(*status),
                ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                    return Fault::Final(self.refused(id, what, &error.to_string()));
                }
                _ => None,
            },
            // What a full disk or a folder that can't be written says; a body that breaks off comes this way as well.
            ApiError::IoError(error)
                if matches!(
                    error.kind(),
                    ErrorKind::StorageFull
                        | ErrorKind::QuotaExceeded
                        | ErrorKind::PermissionDenied
                        | ErrorKind::ReadOnlyFilesystem
                        | ErrorKind::NotFound
                        | ErrorKind::NotADirectory
                ) =>
            {
                return Fault::Final(PretrainedError::Io {
                    path: self.repository(id),
                    source: std::io::Error::new(error.kind(), error.to_string()),
                });
            }
            ApiError::IoError(_) => None,
            ApiError::InvalidResume => Some(416),
            ApiError::LockAcquisition(_) => None,
            _ => return Fault::Final(self.refused(id, what, &error.to_string())),
        };
        match status {
            Some(status @ (401 | 403)) => Fault::Final(match self.settings.token.is_some() {
                true => PretrainedError::WrongToken {
                    id: id_,
                    endpoint,
                    status,
                },
                false => PretrainedError::NoToken {
                    id: id_,
                    endpoint,
                    status,
                },
            }),
            Some(404) => Fault::Final(PretrainedError::NoModel { id: id_, endpoint }),
            // What is there of a file is more than the whole, or the whole without a name: it is fetched anew.
            Some(416) => {
                self.remove_parts(id);
                Fault::Passing(error.to_string())
            }
            Some(408 | 429 | 500..) | None => Fault::Passing(error.to_string()),
            Some(_) => Fault::Final(self.refused(id, what, &error.to_string())),
        }
    }

    /// Removes files that hf-hub did not finish; what can't be removed is met again.
    fn remove_parts(&self, id: &str) {
        let entries = self.repository(id).join("blobs").read_dir();
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "part")
            {
                let _kept = fs::remove_file(path);
            }
        }
    }

    fn refused(&self, id: &str, what: &str, cause: &str) -> PretrainedError {
        PretrainedError::Refused {
            id: id.to_owned(),
            endpoint: self.settings.endpoint.clone(),
            what: what.to_owned(),
            cause: cause.to_owned(),
        }
    }
}

/// Runs `work` on a thread and waits for it, as long as `heard` changes at least once in each `silence`. A thread that is not
/// waited for any longer is left to itself, and the process must not go on with the files it writes.
fn watched<T: Send + 'static>(
    silence: Duration,
    heard: &AtomicU64,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RecvTimeoutError> {
    let (done, result) = channel();
    std::thread::spawn(move || {
        let _nobody_waits = done.send(work());
    });
    let mut before = heard.load(Ordering::Relaxed);
    loop {
        match result.recv_timeout(silence) {
            Err(RecvTimeoutError::Timeout) if heard.load(Ordering::Relaxed) != before => {
                before = heard.load(Ordering::Relaxed);
            }
            result => return result,
        }
    }
}

/// Whether a file of the cache is not what its name says; the large ones are named by their SHA-256.
fn damage(path: &Path) -> std::io::Result<Option<String>> {
    let blob = fs::canonicalize(path)?;
    let name = blob.file_name().unwrap_or_default().to_string_lossy();
    if !is_hex(&name, 64) {
        return Ok(None);
    }
    let mut sha = Sha256::new();
    std::io::copy(&mut File::open(&blob)?, &mut sha)?;
    let found = format!("{:x}", sha.finalize());
    Ok((found != name.to_lowercase())
        .then(|| format!("its SHA-256 is {found}, and should be {name}")))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a revision is a commit and not a branch or a tag.
fn is_commit(revision: &str) -> bool {
    is_hex(revision, 40)
}

/// The name of a model's folder in the cache.
fn folder_name(id: &str) -> String {
    Repo::model(id.to_owned()).folder_name()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(pairs: &[(&str, &str)]) -> Result<Hub, PretrainedError> {
        Hub::new(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_says_where_the_cache_is() {
        let cache = |pairs: &[(&str, &str)]| hub(pairs).map(|hub| hub.cache);
        let plain = cache(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "/f")]).unwrap(), Path::new("/f/hub"));
        let named = cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/cache")]);
        assert_eq!(named.unwrap(), Path::new("/cache"));
        for wrong in [&[("HOME", "/h"), ("HF_ENDPOINT", "mirror")][..], &[]] {
            assert!(cache(wrong).unwrap_err().is_config());
        }
    }

    #[test]
    fn large_files_are_checked_against_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let right = format!("{:x}", Sha256::digest("abc"));
        let write = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, "abc").unwrap();
            damage(&path).unwrap()
        };
        assert_eq!(write(&right), None);
        assert_eq!(write("2c8b08da5ce60398e1f19af0e5dccc744df274b8"), None);
        let wrong = right.replace(|c: char| c.is_ascii_digit(), "0");
        assert!(write(&wrong).unwrap().contains(&right));
    }

    #[test]
    fn silence_ends_the_wait() {
        let silence = Duration::from_millis(40);
        let heard = Arc::new(AtomicU64::new(0));
        assert_eq!(watched(silence, &heard, || 5), Ok(5));
        let slow = || std::thread::sleep(Duration::from_secs(5));
        assert_eq!(
            watched(silence, &heard, slow),
            Err(RecvTimeoutError::Timeout)
        );
        let counter = Arc::clone(&heard);
        let steady = move || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(10));
                counter.fetch_add(1, Ordering::Relaxed);
            }
        };
        assert_eq!(watched(silence, &heard, steady), Ok(()));
    }
}
