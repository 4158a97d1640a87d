//! Progress lines of a download: one at its start, and one every [`PROGRESS_INTERVAL`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::DecimalBytes;

/// Time between two progress lines about one file.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of one file's download.
#[derive(Debug)]
pub(super) struct FileProgress {
    model: String,
    file: String,
    size: u64,
    done: u64,
    printed: Option<Instant>,
    received: Arc<AtomicU64>,
}

impl FileProgress {
    /// Progress of a file of unknown size; `received` grows with every byte, for the idle timeout.
    pub(super) fn new(model: &str, file: &str, received: Arc<AtomicU64>) -> Self {
        Self {
            model: model.to_owned(),
            file: file.to_owned(),
            size: 0,
            done: 0,
            printed: None,
            received,
        }
    }

    /// Starts a download of `size` bytes.
    pub(super) fn begin(&mut self, size: u64) {
        self.size = size;
        self.done = 0;
        self.received.fetch_add(1, Ordering::Relaxed);
        if self.printed.is_none() {
            errln!(
                "fetching {}: {}, {}",
                self.model,
                self.file,
                DecimalBytes(size)
            );
            self.printed = Some(Instant::now());
        }
    }

    /// Counts received bytes.
    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        self.received.fetch_add(bytes, Ordering::Relaxed);
        if self
            .printed
            .is_some_and(|printed| printed.elapsed() >= PROGRESS_INTERVAL)
        {
            errln!(
                "  {}: {} of {}",
                self.file,
                DecimalBytes(self.done),
                DecimalBytes(self.size)
            );
            self.printed = Some(Instant::now());
        }
    }
}

impl hf_hub::api::Progress for FileProgress {
    fn init(&mut self, size: usize, _filename: &str) {
        self.begin(size as u64);
    }

    fn update(&mut self, size: usize) {
        self.add(size as u64);
    }

    fn finish(&mut self) {}
}
