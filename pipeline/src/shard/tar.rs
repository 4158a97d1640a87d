//! Tar members to samples, one after another, from any reader.

use std::io::{self, Cursor, Read};
use std::ops::ControlFlow;

use bytes::Bytes;

use super::gzip::{GzipFault, Inflate, is_gzip};
use super::limits::{
    HeldMembers, MAX_HEADER_BYTES, MAX_HOLE_BYTES, MAX_PATH_BYTES, MAX_SAMPLE_BYTES,
    MAX_SAMPLE_MEMBERS, ReadLimit, START_BYTES,
};
use super::other_file::describe;
use super::sample::{Excess, Sample, split_name};

/// Size of a block, and of a member's header.
pub(super) const BLOCK_BYTES: u64 = 512;

/// Compressed bytes handed to the decompressor at once.
const COMPRESSED_BYTES: usize = 64 << 10;

/// Longest start of a member's path in a message.
const SHOWN_PATH_BYTES: usize = 200;

/// Bytes that are read after a tar's end blocks: enough for the padding and a gzip's checksum.
pub(crate) const TAIL_BYTES: u64 = 1 << 20;

/// Limits of reading a shard.
#[derive(Debug, Clone)]
pub(crate) struct TarOptions {
    /// The members that are read.
    pub(crate) held: HeldMembers,
    /// Most bytes that are read after the tar's end.
    pub(crate) max_tail_bytes: u64,
}

/// Why a shard can't be read to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The first header is wrong: the object is not a tar.
    #[error("is not a tar: {0}")]
    NotATar(String),
    /// The first header is right, and a later part is wrong. The samples before the fault were delivered.
    #[error("{0}")]
    Broken(String),
}

/// An item of a shard.
#[derive(Debug)]
pub(crate) enum TarItem {
    Sample(Sample),
    PassedOver(PassedOver),
    /// Number of bytes after the tar's end, up to the last that is not zero: writers pad with zeros.
    Trailing(u64),
}

/// A member that belongs to no sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PassedOver {
    pub(crate) path: String,
    pub(crate) kind: PassedOverKind,
}

/// The kind of a member that belongs to no sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PassedOverKind {
    Folder,
    Link,
    /// A device, a pipe, a sparse file of the PAX format, or one with large holes.
    Special,
    /// A file without an extension, a hidden one, or webdataset's own.
    Name,
    /// A file with a path of more bytes than a system allows.
    LongPath,
}

impl PassedOverKind {
    /// The kind of an entry; `None` for a file that can be read.
    fn of(entry: &mut tar::Entry<'_, impl Read>, path: &[u8]) -> Option<Self> {
        use tar::EntryType::{Continuous, Directory, GNUSparse, Link, Regular, Symlink};
        match entry.header().entry_type() {
            Regular | Continuous | GNUSparse => {}
            Directory => return Some(Self::Folder),
            Symlink | Link => return Some(Self::Link),
            _ => return Some(Self::Special),
        }
        if path.len() > MAX_PATH_BYTES {
            return Some(Self::LongPath);
        }
        let stored = stored_bytes(entry).unwrap_or(0);
        if entry.size().saturating_sub(stored) > MAX_HOLE_BYTES {
            return Some(Self::Special);
        }
        // The tar reader does not support sparse files of the PAX format.
        let is_pax_sparse = match entry.pax_extensions() {
            Ok(Some(extensions)) => extensions
                .flatten()
                .any(|pair| pair.key_bytes().starts_with(b"GNU.sparse.")),
            Ok(None) | Err(_) => false,
        };
        is_pax_sparse.then_some(Self::Special)
    }
}

/// An error's message as one line of printable characters: it may quote a damaged header.
fn printable(error: &std::io::Error) -> String {
    let text: String = error
        .to_string()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Reads `reader` as a tar, or a tar in gzip, and passes its items to `deliver`, in order, until that breaks.
///
/// Consecutive members with one key form a sample; a repeated extension begins a new sample, as in the
/// reference's loader. Folders and links are passed over. The sample in which a fault occurs is dropped,
/// since members may be missing.
pub(crate) fn read_samples(
    reader: impl Read,
    options: &TarOptions,
    deliver: impl FnMut(TarItem) -> ControlFlow<()>,
) -> Result<(), TarError> {
    let (start, reader) = peek(reader)?;
    if start.is_empty() {
        return Err(TarError::Broken("is empty: 0 bytes".to_owned()));
    }
    if !is_gzip(&start) {
        return read_tar(reader, options, deliver).map_err(|error| named(error, &start, ""));
    }
    let (start, reader) = peek(Inflate::new(reader, COMPRESSED_BYTES))?;
    read_tar(reader, options, deliver).map_err(|error| named(error, &start, " in gzip"))
}

/// The first bytes of a file, as many as a tar's header has, and a reader of the whole file.
fn peek<R: Read>(mut reader: R) -> Result<(Vec<u8>, impl Read), TarError> {
    let mut start = Vec::new();
    let read = reader.by_ref().take(BLOCK_BYTES).read_to_end(&mut start);
    read.map_err(|error| TarError::Broken(printable(&error)))?;
    Ok((start.clone(), Cursor::new(start).chain(reader)))
}

/// Says what a file is that is not a tar, if its first bytes tell.
fn named(error: TarError, start: &[u8], packed: &str) -> TarError {
    match error {
        TarError::NotATar(cause) => TarError::NotATar(match describe(start) {
            Some(what) => format!("it is {}{packed}{}", what.name, what.advice),
            // The cause would quote the bytes.
            None if start.iter().any(|&byte| byte >= 0x80) => {
                format!("its first bytes{packed} are those of no known format")
            }
            None => cause,
        }),
        other => other,
    }
}

fn read_tar(
    reader: impl Read,
    options: &TarOptions,
    mut deliver: impl FnMut(TarItem) -> ControlFlow<()>,
) -> Result<(), TarError> {
    let limit = ReadLimit::new();
    let mut archive = tar::Archive::new(limit.reader(reader));
    let entries = archive
        .entries()
        .map_err(|error| TarError::NotATar(printable(&error)))?;
    let mut current: Option<Group> = None;
    let mut last_path = String::new();
    for (index, entry) in entries.enumerate() {
        let mut entry = entry.map_err(|error| match limit.fault() {
            _ if index == 0 && GzipFault::is_behind(&error) => TarError::Broken(printable(&error)),
            None if index == 0 => TarError::NotATar(printable(&error)),
            fault => {
                let fault = fault.unwrap_or_else(|| printable(&error));
                TarError::Broken(after(&fault, &last_path))
            }
        })?;
        limit.allow(stored_bytes(&entry)?);
        if entry.header().entry_type().is_pax_global_extensions() && entry.size() > MAX_HEADER_BYTES
        {
            let fault = format!(
                "the global PAX records at byte {} have {} bytes, more than {MAX_HEADER_BYTES}",
                entry.raw_header_position(),
                entry.size()
            );
            return Err(TarError::Broken(after(&fault, &last_path)));
        }
        let path = entry.path_bytes().into_owned();
        last_path = shown(&path);
        let split = match PassedOverKind::of(&mut entry, &path) {
            None => split_name(&path).ok_or(PassedOverKind::Name),
            Some(kind) => Err(kind),
        };
        let (key, extension) = match split {
            Ok(split) => split,
            Err(kind) => {
                let path = last_path.clone();
                match deliver(TarItem::PassedOver(PassedOver { path, kind })) {
                    ControlFlow::Continue(()) => continue,
                    ControlFlow::Break(()) => return Ok(()),
                }
            }
        };
        let repeats = current
            .as_ref()
            .is_some_and(|group| group.key == key && group.sample.has(&extension));
        let group = match &mut current {
            Some(group) if group.key == key && !repeats => group,
            _ => {
                let mut next = Group::new(key);
                next.sample.is_part = repeats;
                if let Some(Group { mut sample, .. }) = current.take() {
                    sample.is_part |= repeats;
                    if let ControlFlow::Break(()) = deliver(TarItem::Sample(sample)) {
                        return Ok(());
                    }
                }
                current.insert(next)
            }
        };
        group
            .add(extension, &mut entry, &options.held)
            .map_err(|fault| TarError::Broken(fault.describe(&last_path)))?;
    }
    if let Some(Group { sample, .. }) = current
        && let ControlFlow::Break(()) = deliver(TarItem::Sample(sample))
    {
        return Ok(());
    }
    limit.lift();
    // The tail is read so that damage of a gzip is detected, and a cache gets the whole shard.
    let tail = archive.into_inner().take(options.max_tail_bytes);
    match trailing(tail) {
        Ok(0) => {}
        Ok(bytes) => drop(deliver(TarItem::Trailing(bytes))),
        Err(error) => return Err(TarError::Broken(after(&error.to_string(), &last_path))),
    }
    Ok(())
}

/// A fault, and the last member before it, if there is one.
fn after(fault: &str, path: &str) -> String {
    if path.is_empty() {
        return fault.to_owned();
    }
    format!("{fault} after member {path:?}")
}

/// A member's path as text, for messages: at most its first bytes.
fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(&path[..path.len().min(SHOWN_PATH_BYTES)]).into_owned()
}

/// Size of a member's content in the tar: that of a sparse file is without its holes.
fn stored_bytes(entry: &tar::Entry<'_, impl Read>) -> Result<u64, TarError> {
    if !entry.header().entry_type().is_gnu_sparse() {
        return Ok(entry.size());
    }
    let size = entry.header().entry_size();
    size.map_err(|error| TarError::Broken(printable(&error)))
}

/// The sample of which members are being read.
struct Group {
    /// Exact bytes: the sample's key replaces bytes that are not UTF-8.
    key: Vec<u8>,
    sample: Sample,
    members: usize,
    /// Bytes of the members that are held, and of all names.
    bytes: u64,
}

impl Group {
    fn new(key: &[u8]) -> Self {
        Self {
            key: key.to_owned(),
            sample: Sample::new(key),
            members: 0,
            bytes: 0,
        }
    }

    /// Adds a member. Reads its content if it is one of `held`.
    fn add(
        &mut self,
        extension: String,
        entry: &mut tar::Entry<'_, impl Read>,
        held: &HeldMembers,
    ) -> Result<(), MemberFault> {
        if self.sample.excess.is_some() {
            return Ok(());
        }
        let size = entry.size();
        let limit = held.limit(&extension);
        let kept = match limit {
            Some(limit) if size <= limit => size,
            Some(_) => 0,
            None => size.min(START_BYTES),
        };
        self.members += 1;
        self.bytes += kept + extension.len() as u64;
        if self.members > MAX_SAMPLE_MEMBERS {
            self.sample.exceed(Excess::Members);
        } else if self.bytes > MAX_SAMPLE_BYTES {
            self.sample.exceed(Excess::Bytes);
        } else if limit.is_some_and(|limit| size > limit) {
            self.sample.oversized.insert(extension, size);
        } else {
            let content = read_start(entry, kept, size)?;
            let members = match limit {
                Some(_) => &mut self.sample.members,
                None => &mut self.sample.others,
            };
            members.insert(extension, content);
        }
        Ok(())
    }
}

/// Why a member can't be read.
enum MemberFault {
    Read(io::Error),
    Cut { read: usize, size: u64 },
}

impl MemberFault {
    fn describe(&self, path: &str) -> String {
        match self {
            Self::Read(error) => format!("{error} in member {path:?}"),
            Self::Cut { read, size } => {
                format!("ends inside member {path:?}, after {read} of {size} bytes")
            }
        }
    }
}

/// Reads the first `kept` bytes of a member of `size` bytes.
fn read_start(reader: impl Read, kept: u64, size: u64) -> Result<Bytes, MemberFault> {
    let wanted = usize::try_from(kept).unwrap_or(usize::MAX);
    let mut content = Vec::new();
    // A damaged header may claim any size, so only a part is reserved in advance.
    content.reserve_exact(wanted.min(1 << 20));
    reader
        .take(kept)
        .read_to_end(&mut content)
        .map_err(MemberFault::Read)?;
    if content.len() != wanted {
        let read = content.len();
        return Err(MemberFault::Cut { read, size });
    }
    Ok(Bytes::from(content))
}

fn trailing(mut reader: impl Read) -> io::Result<u64> {
    let mut piece = vec![0; 16 << 10];
    let (mut read, mut last) = (0, 0);
    loop {
        let count = match reader.read(&mut piece) {
            Ok(0) => return Ok(last),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if let Some(at) = piece[..count].iter().rposition(|&byte| byte != 0) {
            last = read + at as u64 + 1;
        }
        read += count as u64;
    }
}

#[cfg(test)]
mod tests;
