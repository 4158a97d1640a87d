//! The lock of a prefix in S3: an object that its holder rewrites while it lives.
//!
//! Every write of the object is conditional, so of two processes one succeeds. A process that is killed leaves the object; another
//! takes it over if the holder is known to have ended, or has not rewritten the object for the time that it names. No clocks are compared.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coffey_pipeline::{ConditionalWrite, Destination, SourceError, WriteCondition};
use serde::{Deserialize, Serialize};

use super::{LOCK, LockWait, held};
use crate::process::{ProcessId, host_name};
use crate::train::TrainError;

/// Time without a rewrite after which the lock of this process counts as left behind.
const LEASE: Duration = Duration::from_secs(60);
/// The longest lease that is waited for.
const LONGEST_LEASE: Duration = Duration::from_secs(600);
/// Time between two rewrites.
const RENEWAL: Duration = Duration::from_secs(15);
/// Time between two looks at a lock that another process holds.
const PAUSE: Duration = Duration::from_secs(1);
/// Most bytes of a lock.
const MOST_TEXT: u64 = 4096;

/// The content of the object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    /// The process, for people.
    holder: String,
    process: ProcessId,
    /// Rewrites of the object: each one changes its ETag.
    renewed: u64,
    /// Time without a rewrite after which the lock counts as left behind. Seconds.
    lease: u64,
}

impl Holder {
    fn this_process() -> Self {
        Self {
            holder: format!("pid {} on host {}", std::process::id(), host_name()),
            process: ProcessId::this(),
            renewed: 0,
            lease: LEASE.as_secs(),
        }
    }
}

/// A prefix that this process holds until the value is dropped. A thread renews the lock.
#[derive(Debug)]
pub(in crate::train) struct PrefixLock {
    shared: Arc<Shared>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread that renews the lock shares with the others.
#[derive(Debug)]
struct Shared {
    destination: Destination,
    place: PathBuf,
    /// Locked while a request is under way.
    written: Mutex<Written>,
    /// The process that has taken the lock over.
    lost: OnceLock<String>,
}

/// The object as this process has written it last.
#[derive(Debug)]
struct Written {
    own: Holder,
    etag: String,
}

impl PrefixLock {
    /// Locks a prefix; `None` if the server has no conditional writes.
    ///
    /// # Errors
    /// [`TrainError::Mismatch`] if another process holds the lock, [`TrainError::Stopped`] if the wait is cancelled, else why the object
    /// can't be read or written.
    pub(in crate::train) fn acquire(
        destination: &Destination,
        place: &Path,
        wait: LockWait<'_>,
    ) -> Result<Option<Self>, TrainError> {
        let own = Holder::this_process();
        let mut condition: Option<String> = None;
        let mut watch = None;
        let etag = loop {
            let expected = match &condition {
                None => WriteCondition::Absent,
                Some(etag) => WriteCondition::Unchanged(etag),
            };
            match destination.write_if(LOCK, &content(&own), expected)? {
                ConditionalWrite::Written(etag) => break etag,
                ConditionalWrite::Unsupported => return Ok(None),
                ConditionalWrite::Refused => {}
            }
            condition = match read(destination)? {
                None => None,
                // The response of the write was lost.
                Some((found, etag)) if found == Some(own.clone()) => break etag,
                Some((found, etag)) => {
                    let free = is_left_behind(&mut watch, found, &etag, place, wait)?;
                    free.then_some(etag)
                }
            };
        };
        // A server that ignores the condition overwrites the object.
        let again = destination.write_if(LOCK, &content(&own), WriteCondition::Absent)?;
        if again != ConditionalWrite::Refused {
            destination.remove(LOCK)?;
            return Ok(None);
        }
        let shared = Arc::new(Shared {
            destination: destination.clone(),
            place: place.to_owned(),
            written: Mutex::new(Written { own, etag }),
            lost: OnceLock::new(),
        });
        let (stop, stopped) = mpsc::channel();
        let renewed = Arc::clone(&shared);
        let renew = move || {
            while stopped.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                // The next renewal may succeed; after the time of the lease another process may hold the lock.
                let _ = renewed.renew();
            }
        };
        let thread = thread::Builder::new()
            .name("lock".to_owned())
            .spawn(renew)
            .map_err(crate::train::io(place))?;
        Ok(Some(Self {
            shared,
            stop: Some(stop),
            thread: Some(thread),
        }))
    }

    /// Fails if another process has taken the lock over. Asks the server only with `renew`, else returns at once.
    pub(in crate::train) fn check(&self, renew: bool) -> Result<(), TrainError> {
        if renew {
            self.shared.renew()?;
        }
        match self.shared.lost.get() {
            None => Ok(()),
            Some(holder) => Err(TrainError::Mismatch(format!(
                "{}: {holder} has taken this output over: this process did not renew its lock for {} s (it stood still, or could not \
                 reach the server)",
                self.shared.place.display(),
                LEASE.as_secs()
            ))),
        }
    }
}

impl Drop for PrefixLock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // What can't be removed is taken over later.
        if self.shared.renew().is_ok() && self.shared.lost.get().is_none() {
            let _ = self.shared.destination.remove(LOCK);
        }
    }
}

impl Shared {
    /// Rewrites the object, unless another process has.
    fn renew(&self) -> Result<(), SourceError> {
        if self.lost.get().is_some() {
            return Ok(());
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = written.own.clone();
        next.renewed += 1;
        let unchanged = WriteCondition::Unchanged(&written.etag);
        match self
            .destination
            .write_if(LOCK, &content(&next), unchanged)?
        {
            ConditionalWrite::Written(etag) => written.etag = etag,
            ConditionalWrite::Unsupported => {}
            ConditionalWrite::Refused => match read(&self.destination)? {
                // The response of an earlier write was lost.
                Some((Some(found), etag)) if found.process == next.process => written.etag = etag,
                found => {
                    let other = found.and_then(|(found, _)| found);
                    let other = other.map_or_else(|| "another process".to_owned(), |o| o.holder);
                    let _ = self.lost.set(other);
                }
            },
        }
        written.own = next;
        Ok(())
    }
}

/// Fails if a process of this machine holds the lock of a prefix; changes nothing.
pub(in crate::train) fn check_prefix_free(
    destination: &Destination,
    place: &Path,
) -> Result<(), TrainError> {
    match read(destination)? {
        Some((Some(found), _)) if found.process.has_ended() == Some(false) => {
            Err(held(place, &format!(" ({})", found.holder)))
        }
        _ => Ok(()),
    }
}

/// A lock of another process, while it is waited for.
#[derive(Debug)]
struct Watch {
    begun: Instant,
    etag: String,
    /// When the object was first seen with this ETag.
    since: Instant,
}

/// Whether the holder of a lock has ended. Waits a moment if that is not known yet.
fn is_left_behind(
    watch: &mut Option<Watch>,
    found: Option<Holder>,
    etag: &str,
    place: &Path,
    wait: LockWait<'_>,
) -> Result<bool, TrainError> {
    let named = found
        .as_ref()
        .map_or_else(String::new, |found| format!(" ({})", found.holder));
    let lease = found.as_ref().map(|found| found.lease);
    let lease = lease.map_or(LEASE, |lease| Duration::from_secs(lease).min(LONGEST_LEASE));
    let ended = found.and_then(|found| found.process.has_ended());
    if ended == Some(true) {
        return Ok(true);
    }
    let now = Instant::now();
    let Some(watch) = watch else {
        if ended.is_none() {
            (wait.say)(format!(
                "{}: another process{named} has locked this output: waiting until it renews the lock, {} s at most",
                place.display(),
                lease.as_secs()
            ));
        }
        *watch = Some(Watch {
            begun: now,
            etag: etag.to_owned(),
            since: now,
        });
        return Ok(false);
    };
    let renewed = watch.etag != etag;
    if renewed {
        (watch.etag, watch.since) = (etag.to_owned(), now);
    } else if ended.is_none() && watch.since.elapsed() >= lease {
        return Ok(true);
    }
    let lives = renewed || ended == Some(false);
    if !wait.wait(PAUSE, watch.begun)? && lives {
        return Err(held(place, &named));
    }
    Ok(false)
}

/// The lock's content, `None` if it is not that of a lock, and its ETag; `None` if there is no lock.
fn read(destination: &Destination) -> Result<Option<(Option<Holder>, String)>, SourceError> {
    let object = match destination.open(LOCK) {
        Err(SourceError::NotFound { .. }) => return Ok(None),
        object => object?,
    };
    let etag = object.etag().unwrap_or_default().to_owned();
    let mut text = Vec::new();
    object
        .take(MOST_TEXT)
        .read_to_end(&mut text)
        .map_err(|error| destination.failed(LOCK, error))?;
    Ok(Some((serde_json::from_slice(&text).ok(), etag)))
}

fn content(holder: &Holder) -> Vec<u8> {
    serde_json::to_vec(holder).unwrap_or_default()
}
