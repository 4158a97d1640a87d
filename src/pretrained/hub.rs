//! Models of the Hugging Face Hub, into the cache that Python's `huggingface_hub` uses as well.
//!
//! hf-hub downloads files and knows the layout of the cache. This module chooses the files and the commit: it resolves a revision
//! once and requests every file by its commit, so that a branch that moves meanwhile can't mix two versions. It adds retries,
//! an idle timeout and checksums.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use coffey_pipeline::bounded::{self, MAX_FILE_BYTES};
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::files::{self, Completeness, Components};
use super::progress::FileProgress;
use super::{Fetched, PretrainedError, cache, io};
use crate::config::Model;
use crate::hub::{AttemptError, MAX_ATTEMPTS, Settings, retry};
use crate::process;
use tokio_util::sync::CancellationToken;

/// Fetches models from the Hub that the environment names.
#[derive(Clone)]
pub(super) struct HubClient {
    settings: Settings,
    cache: PathBuf,
}

impl HubClient {
    /// Reads what [`Settings`] reads, and `HF_HUB_CACHE`.
    pub(super) fn from_env() -> Result<Self, PretrainedError> {
        Self::new(process::env_var)
    }

    fn new(env_var: impl Fn(&str) -> Option<String>) -> Result<Self, PretrainedError> {
        let settings = Settings::new(&env_var)?;
        let cache = env_var("HF_HUB_CACHE").or_else(|| env_var("HUGGINGFACE_HUB_CACHE"));
        let cache = match (cache, &settings.home) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => home.join("hub"),
            (None, None) => return Err(PretrainedError::NoHome { set: "HF_HOME" }),
        };
        Ok(Self {
            settings,
            // hf-hub creates links relative to this path.
            cache: std::path::absolute(&cache).map_err(io(&cache))?,
        })
    }

    /// Fetches `components` of a model at `revision`.
    pub(super) fn fetch(
        &self,
        id: &str,
        revision: &str,
        components: &Components,
    ) -> Result<Fetched, PretrainedError> {
        let cached = self.cached_commit(id, revision).and_then(|commit| {
            let folder = self.snapshot(id, &commit);
            let completeness = files::completeness(components, &folder);
            let commit = Some(commit);
            (completeness != Completeness::Incomplete)
                .then_some((Fetched { folder, commit }, completeness))
        });
        // A commit never changes, so no request is necessary, except for the files that Python did not fetch.
        let suffices =
            |found| self.settings.offline || is_commit(revision) && found == Completeness::Complete;
        match cached {
            Some((cached, found)) if suffices(found) => return Ok(cached),
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
            (Err(error @ PretrainedError::Unreachable { .. }), Some((cached, _)))
            | (Err(error @ PretrainedError::Stalled { .. }), Some((cached, _))) => {
                errln!("warning: {error}; using the files in the cache");
                return Ok(cached);
            }
            (Err(error), _) => return Err(error),
        };
        let folder = self.fill(id, &info, components)?;
        if !is_commit(revision) {
            let path = self.repository(id).join("refs").join(revision);
            cache::write(&path, &info.sha)?;
        }
        Ok(Fetched {
            folder,
            commit: Some(info.sha),
        })
    }

    /// Downloads the files of a commit that the cache lacks; returns the snapshot folder.
    fn fill(
        &self,
        id: &str,
        info: &RepoInfo,
        components: &Components,
    ) -> Result<PathBuf, PretrainedError> {
        let not_a_model = |lacks: String| PretrainedError::NotAModel {
            model: id.to_owned(),
            lacks,
        };
        let available: BTreeSet<String> = info
            .siblings
            .iter()
            .map(|file| file.rfilename.clone())
            .collect();
        let plan = super::plan(id, components, &available, &|_| None)?;
        let lock = self.cache.join(".locks").join(folder_name(id));
        let _lock = cache::lock(&lock.join("coffey.lock"), id)?;
        let folder = self.snapshot(id, &info.sha);
        let missing = |file: &&String| !folder.join(file).is_file();
        for file in plan.files.iter().filter(missing) {
            self.download(id, &info.sha, file)?;
        }
        for index in &plan.indexes {
            let shards = files::shards(index, &folder.join(index)).map_err(not_a_model)?;
            files::missing_shards(index, &shards, &available).map_err(not_a_model)?;
            for shard in shards.iter().filter(missing) {
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

    /// The commit that a revision had at its last request.
    fn cached_commit(&self, id: &str, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = bounded::read_text_file(
            &self.repository(id).join("refs").join(revision),
            MAX_FILE_BYTES,
        )
        .ok()?;
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

    /// The commit of a revision, and the names of its files.
    fn info(&self, id: &str, revision: &str) -> Result<RepoInfo, PretrainedError> {
        const WHAT: &str = "the list of files";
        let ask = |revision: &str| {
            let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
            self.retry(id, WHAT, |hub, _| {
                let repo = repo.clone();
                move || hub.api()?.repo(repo).info()
            })
        };
        let info = match ask(revision) {
            // The Hub's answer to a wrong name and to a wrong revision is the same.
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
        if is_commit(&info.sha) {
            Ok(info)
        } else {
            Err(self.refused(id, WHAT, "its commit is not a SHA-1"))
        }
    }

    /// Downloads one file of a commit; the caller holds the lock.
    fn download(&self, id: &str, commit: &str, file: &str) -> Result<(), PretrainedError> {
        let repo = Repo::with_revision(id.to_owned(), RepoType::Model, commit.to_owned());
        let mut may_repeat = true;
        loop {
            let path = self.retry(id, file, |hub, received| {
                let progress = FileProgress::new(id, file, received);
                let (repo, file) = (repo.clone(), file.to_owned());
                move || {
                    hub.api()?
                        .repo(repo)
                        .download_with_progress(&file, progress)
                }
            })?;
            match damage(&path) {
                Ok(None) => return Ok(()),
                // For example, a proxy sent the whole file instead of its rest.
                Ok(Some(cause)) => {
                    let blob = fs::canonicalize(&path).map_err(io(&path))?;
                    for path in [&path, &blob] {
                        fs::remove_file(path).map_err(io(path))?;
                    }
                    if !may_repeat {
                        return Err(PretrainedError::Damaged {
                            model: id.to_owned(),
                            file: file.to_owned(),
                            cause,
                        });
                    }
                    may_repeat = false;
                }
                Err(error) => return Err(io(&path)(error)),
            }
        }
    }

    /// Sends a request, with retries. `request` makes a closure that runs on a thread of its own, because hf-hub has no timeout; the
    /// closure adds received bytes to the counter.
    fn retry<T, F>(
        &self,
        id: &str,
        what: &str,
        request: impl Fn(Self, Arc<AtomicU64>) -> F,
    ) -> Result<T, PretrainedError>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    {
        let attempt =
            || {
                let received = Arc::new(AtomicU64::new(0));
                let work = request(self.clone(), Arc::clone(&received));
                match with_idle_timeout(self.settings.idle_timeout, &received, work) {
                    Ok(Ok(value)) => Ok(value),
                    Ok(Err(error)) => Err(self.classify(id, what, error)),
                    Err(RecvTimeoutError::Timeout) => {
                        Err(AttemptError::Permanent(PretrainedError::Stalled {
                            id: id.to_owned(),
                            endpoint: self.settings.endpoint.clone(),
                            seconds: self.settings.idle_timeout.as_secs(),
                            what: what.to_owned(),
                        }))
                    }
                    Err(RecvTimeoutError::Disconnected) => Err(AttemptError::Permanent(
                        self.refused(id, what, "hf-hub panicked during the request"),
                    )),
                }
            };
        // A signal ends the process while models are fetched, so there is no stop to wait for.
        retry(&CancellationToken::default(), attempt, |cause| {
            PretrainedError::Unreachable {
                id: id.to_owned(),
                endpoint: self.settings.endpoint.clone(),
                attempts: MAX_ATTEMPTS,
                cause,
            }
        })
    }

    /// Turns an error of hf-hub into a permanent or a transient one.
    fn classify(&self, id: &str, what: &str, error: ApiError) -> AttemptError<PretrainedError> {
        let status = match &error {
            ApiError::RequestError(error) => match error.as_ref() {
                ureq::Error::StatusCode(status) => Some(*status),
                ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                    return AttemptError::Permanent(self.refused(id, what, &error.to_string()));
                }
                _ => None,
            },
            // A full disk or a folder without write access; an interrupted body is an I/O error of another kind.
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
                return AttemptError::Permanent(PretrainedError::Io {
                    path: self.repository(id),
                    source: std::io::Error::new(error.kind(), error.to_string()),
                });
            }
            ApiError::IoError(_) => None,
            ApiError::InvalidResume => Some(416),
            ApiError::LockAcquisition(_) => None,
            _ => return AttemptError::Permanent(self.refused(id, what, &error.to_string())),
        };
        let endpoint = self.settings.endpoint.clone();
        AttemptError::Permanent(match status {
            Some(status @ (401 | 403)) => {
                let id = id.to_owned();
                if self.settings.token.is_some() {
                    PretrainedError::WrongToken {
                        id,
                        endpoint,
                        status,
                    }
                } else {
                    PretrainedError::NoToken {
                        id,
                        endpoint,
                        status,
                    }
                }
            }
            Some(404) => PretrainedError::NoModel {
                id: id.to_owned(),
                endpoint,
            },
            // The unfinished file is longer than the whole file, or complete and not renamed: download it again.
            Some(416) => {
                self.remove_parts(id);
                return AttemptError::transient(error);
            }
            Some(408 | 429 | 500..) | None => return AttemptError::transient(error),
            Some(_) => self.refused(id, what, &error.to_string()),
        })
    }

    /// Removes unfinished files of hf-hub.
    fn remove_parts(&self, id: &str) {
        let entries = self.repository(id).join("blobs").read_dir();
        for entry in entries.into_iter().flatten().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "part")
            {
                // A file that can't be removed makes the next request fail as well.
                fs::remove_file(path).ok();
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

/// Runs `work` on a thread and waits for it, as long as `received` changes at least once in each `timeout`. After a timeout the
/// thread continues by itself: the process must not use the files that the thread writes.
fn with_idle_timeout<T: Send + 'static>(
    timeout: Duration,
    received: &AtomicU64,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RecvTimeoutError> {
    let (done, result) = channel();
    std::thread::spawn(move || {
        // The receiver is gone after a timeout.
        done.send(work()).ok();
    });
    let mut before = received.load(Ordering::Relaxed);
    loop {
        match result.recv_timeout(timeout) {
            Err(RecvTimeoutError::Timeout) if received.load(Ordering::Relaxed) != before => {
                before = received.load(Ordering::Relaxed);
            }
            result => return result,
        }
    }
}

/// A description of a cached file's damage, if its SHA-256 differs from its name. Only large files are named by their SHA-256.
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

/// Name of a model's folder in the cache.
fn folder_name(id: &str) -> String {
    Repo::model(id.to_owned()).folder_name()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::env_of;

    #[test]
    fn hub_cache_comes_from_the_environment() {
        let cache =
            |variables: &[(&str, &str)]| HubClient::new(env_of(variables)).map(|hub| hub.cache);
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
    fn damage_is_found_by_the_sha256_in_the_name() {
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
    fn idle_timeout_ends_the_wait() {
        let timeout = Duration::from_millis(40);
        let received = Arc::new(AtomicU64::new(0));
        assert_eq!(with_idle_timeout(timeout, &received, || 5), Ok(5));
        let slow = || std::thread::sleep(Duration::from_secs(5));
        assert_eq!(
            with_idle_timeout(timeout, &received, slow),
            Err(RecvTimeoutError::Timeout)
        );
        let counter = Arc::clone(&received);
        let steady = move || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(10));
                counter.fetch_add(1, Ordering::Relaxed);
            }
        };
        assert_eq!(with_idle_timeout(timeout, &received, steady), Ok(()));
    }
}
