//! Limits of a shard's members and samples. They bound the memory that any shard takes.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::rc::Rc;

/// Most bytes of the headers of one member: its own, PAX records, GNU long names and the map of a sparse file.
pub(super) const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Longest path of a member, as on Linux. Bytes.
pub(super) const MAX_PATH_BYTES: usize = 4096;
/// Most bytes of holes in a sparse file.
pub(super) const MAX_HOLE_BYTES: u64 = 1 << 20;
/// Most bytes of a sample: the members that are held, and the names of all.
pub(super) const MAX_SAMPLE_BYTES: u64 = 288 << 20;
/// Most members of a sample.
pub(super) const MAX_SAMPLE_MEMBERS: usize = 4096;
/// Largest json of a sample. Bytes.
const MAX_JSON_BYTES: u64 = 1 << 20;
/// Longest caption. Bytes.
pub(crate) const MAX_CAPTION_BYTES: u64 = 64 << 10;
/// Bytes that are kept of a member that is not held.
pub(super) const START_BYTES: u64 = 64;

/// The members that are held, by extension, with the most bytes of each. Larger ones and all others are read past.
#[derive(Debug, Clone, Default)]
pub(crate) struct HeldMembers(BTreeMap<String, u64>);

impl HeldMembers {
    /// The caption and the json of a sample, and its image of at most `max_image_bytes`.
    pub(crate) fn of_images(
        image_keys: &[String],
        caption_keys: &[String],
        max_image_bytes: u64,
    ) -> Self {
        Self::default()
            .with(image_keys, max_image_bytes)
            .with(caption_keys, MAX_CAPTION_BYTES)
            .with(["json"], MAX_JSON_BYTES)
    }

    /// Adds extensions. The larger limit applies to an extension that is added twice.
    pub(crate) fn with(
        mut self,
        extensions: impl IntoIterator<Item = impl AsRef<str>>,
        max_bytes: u64,
    ) -> Self {
        for extension in extensions {
            let limit = self.0.entry(extension.as_ref().to_owned()).or_default();
            *limit = max_bytes.max(*limit);
        }
        self
    }

    /// The most bytes of a member; `None` if it is not held.
    pub(crate) fn limit(&self, extension: &str) -> Option<u64> {
        self.0.get(extension).copied()
    }
}

/// The position in a tar, and the position up to which it may be read.
#[derive(Debug, Clone)]
pub(super) struct ReadLimit(Rc<Position>);

#[derive(Debug)]
struct Position {
    read: Cell<u64>,
    end: Cell<u64>,
}

impl ReadLimit {
    /// The limit of the first member's headers.
    pub(super) fn new() -> Self {
        let (read, end) = (Cell::new(0), Cell::new(MAX_HEADER_BYTES));
        Self(Rc::new(Position { read, end }))
    }

    /// Allows the content of a member whose headers have been read, and the headers of the next member.
    pub(super) fn allow(&self, content: u64) {
        let content = content.checked_next_multiple_of(super::tar::BLOCK_BYTES);
        let content = content.unwrap_or(u64::MAX);
        let end = self.0.read.get().saturating_add(content);
        self.0.end.set(end.saturating_add(MAX_HEADER_BYTES));
    }

    /// Allows the rest of the file.
    pub(super) fn lift(&self) {
        self.0.end.set(u64::MAX);
    }

    /// The fault, if the limit was reached.
    pub(super) fn fault(&self) -> Option<String> {
        let end = self.0.end.get();
        (self.0.read.get() >= end).then(|| {
            format!(
                "the headers of a member (PAX records, a GNU long name or a sparse map) at byte {} have more than \
                 {MAX_HEADER_BYTES} bytes",
                end - MAX_HEADER_BYTES
            )
        })
    }

    /// Applies the limit to a reader of the tar.
    pub(super) fn reader<R: Read>(&self, inner: R) -> impl Read {
        LimitedReader {
            inner,
            limit: self.clone(),
        }
    }
}

struct LimitedReader<R> {
    inner: R,
    limit: ReadLimit,
}

impl<R: Read> Read for LimitedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Position { read, end } = &*self.limit.0;
        let left = usize::try_from(end.get() - read.get()).unwrap_or(usize::MAX);
        if left == 0 && !buffer.is_empty() {
            return Err(io::Error::other(
                "the limit of a member's headers is reached",
            ));
        }
        let length = buffer.len().min(left);
        let count = self.inner.read(&mut buffer[..length])?;
        read.set(read.get() + count as u64);
        Ok(count)
    }
}
