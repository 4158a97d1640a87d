//! What is said while a file is fetched: one line when it begins, and one now and then while it takes long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::DecimalBytes;

/// Time between two lines about the same file.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The progress of one file.
#[derive(Debug)]
pub(super) struct FileProgress {
    model: String,
    file: String,
    size: u64,
    done: u64,
    said: Option<Instant>,
    heard: Arc<AtomicU64>,
}

impl FileProgress {
    /// Of a file whose size is not known yet; `heard` counts what arrives, for whoever watches.
    pub(super) fn new(model: &str, file: &str, heard: Arc<AtomicU64>) -> Self {
        Self {
            model: model.to_owned(),
            file: file.to_owned(),
            size: 0,
            done: 0,
            said: None,
            heard,
        }
    }

    /// The file is of this size and starts to arrive.
    pub(super) fn begin(&mut self, size: u64) {
        self.size = size;
        self.done = 0;
        self.heard.fetch_add(1, Ordering::Relaxed);
        if self.said.is_none() {
            errln!(
                "fetching {}: {}, {}",
                self.model,
                self.file,
                DecimalBytes(size)
            );
            self.said = Some(Instant::now());
        }
    }

    /// So many bytes more have arrived.
    pub(super) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        self.heard.fetch_add(bytes, Ordering::Relaxed);
        if self.said.is_some_and(|said| said.elapsed() >= LINE_EVERY) {
            errln!(
                "  {}: {} of {}",
                self.file,
                DecimalBytes(self.done),
                DecimalBytes(self.size)
            );
            self.said = Some(Instant::now());
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
