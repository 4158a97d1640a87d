//! Tar members to samples, one after another, from any reader.

use std::io::{self, BufReader, Cursor, Read};
use std::ops::ControlFlow;

use bytes::Bytes;

use super::gzip::{Filling, GzipFault, Inflate, is_gzip};
use super::other_file::describe;
use super::sample::{Sample, split_name};

/// Size of a member's header.
const HEADER_BYTES: u64 = 512;

/// Compressed bytes handed to the decompressor at once.
const COMPRESSED_BYTES: usize = 64 << 10;

/// Bytes that are read after a tar's end blocks: enough for the padding and a gzip's checksum.
pub(crate) const TAIL_BYTES: u64 = 1 << 20;

/// Limits of reading a shard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TarOptions {
    /// Larger members are not read. Bytes.
    pub(crate) max_member_bytes: u64,
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
    /// A device, a pipe, or a sparse file of the PAX format.
    Special,
    /// A file without an extension, a hidden one, or webdataset's own.
    Name,
}

impl PassedOverKind {
    /// The kind of an entry; `None` for a file that can be read.
    fn of(entry: &mut tar::Entry<'_, impl Read>) -> Option<Self> {
        use tar::EntryType::{Continuous, Directory, GNUSparse, Link, Regular, Symlink};
        match entry.header().entry_type() {
            Regular | Continuous | GNUSparse => {}
            Directory => return Some(Self::Folder),
            Symlink | Link => return Some(Self::Link),
            _ => return Some(Self::Special),
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
    options: TarOptions,
    deliver: impl FnMut(TarItem) -> ControlFlow<()>,
) -> Result<(), TarError> {
    let (start, reader) = peek(reader)?;
    if start.is_empty() {
        return Err(TarError::Broken("is empty: 0 bytes".to_owned()));
    }
    if !is_gzip(&start) {
        return read_tar(reader, options, deliver).map_err(|error| named(error, &start, ""));
    }
    let reader = BufReader::with_capacity(COMPRESSED_BYTES, Filling(reader));
    let (start, reader) = peek(Inflate::new(reader))?;
    read_tar(reader, options, deliver).map_err(|error| named(error, &start, " in gzip"))
}

/// The first bytes of a file, as many as a tar's header has, and a reader of the whole file.
fn peek<R: Read>(mut reader: R) -> Result<(Vec<u8>, impl Read), TarError> {
    let mut start = Vec::new();
    let read = reader.by_ref().take(HEADER_BYTES).read_to_end(&mut start);
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
    options: TarOptions,
    mut deliver: impl FnMut(TarItem) -> ControlFlow<()>,
) -> Result<(), TarError> {
    let mut archive = tar::Archive::new(reader);
    let entries = archive
        .entries()
        .map_err(|error| TarError::NotATar(printable(&error)))?;
    let mut current: Option<Sample> = None;
    // Exact bytes: the sample's key replaces bytes that are not UTF-8.
    let mut current_key = Vec::new();
    let mut last_path = String::new();
    for (index, entry) in entries.enumerate() {
        let mut entry = match entry {
            Ok(entry) => entry,
            Err(error) if index == 0 && GzipFault::is_behind(&error) => {
                return Err(TarError::Broken(printable(&error)));
            }
            Err(error) if index == 0 => return Err(TarError::NotATar(printable(&error))),
            Err(error) => {
                return Err(TarError::Broken(format!(
                    "{} after member {last_path:?}",
                    printable(&error)
                )));
            }
        };
        let path = entry.path_bytes().into_owned();
        last_path = String::from_utf8_lossy(&path).into_owned();
        let split = match PassedOverKind::of(&mut entry) {
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
        let repeats = current.as_ref().is_some_and(|sample| {
            current_key == key
                && (sample.members.contains_key(&extension)
                    || sample.oversized.contains_key(&extension))
        });
        if repeats || current.is_none() || current_key != key {
            key.clone_into(&mut current_key);
            let mut next = Sample::new(key);
            next.is_part = repeats;
            if let Some(mut done) = current.replace(next) {
                done.is_part |= repeats;
                if let ControlFlow::Break(()) = deliver(TarItem::Sample(done)) {
                    return Ok(());
                }
            }
        }
        let size = entry.size();
        let mut content = Vec::new();
        if size <= options.max_member_bytes {
            let wanted = usize::try_from(size).unwrap_or(usize::MAX);
            // A damaged header may claim any size, so only a part is reserved in advance.
            content.reserve_exact(wanted.min(1 << 20));
            entry
                .read_to_end(&mut content)
                .map_err(|error| TarError::Broken(format!("{error} in member {last_path:?}")))?;
            if content.len() != wanted {
                return Err(TarError::Broken(format!(
                    "ends inside member {last_path:?}, after {} of {size} bytes",
                    content.len()
                )));
            }
        }
        if let Some(sample) = &mut current {
            if size <= options.max_member_bytes {
                sample.members.insert(extension, Bytes::from(content));
            } else {
                sample.oversized.insert(extension, size);
            }
        }
    }
    if let Some(sample) = current.filter(|sample| !sample.is_empty())
        && let ControlFlow::Break(()) = deliver(TarItem::Sample(sample))
    {
        return Ok(());
    }
    // The tail is read so that damage of a gzip is detected, and a cache gets the whole shard.
    let tail = archive.into_inner().take(options.max_tail_bytes);
    match trailing(tail) {
        Ok(0) => {}
        Ok(bytes) => drop(deliver(TarItem::Trailing(bytes))),
        Err(error) => {
            return Err(TarError::Broken(format!(
                "{error} after member {last_path:?}"
            )));
        }
    }
    Ok(())
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
mod tests {
    use super::*;

    fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, path, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read(tar: &[u8]) -> (Vec<Sample>, Result<(), TarError>) {
        let mut samples = Vec::new();
        let options = TarOptions {
            max_member_bytes: 1000,
            max_tail_bytes: TAIL_BYTES,
        };
        let result = read_samples(tar, options, |found| {
            if let TarItem::Sample(sample) = found {
                samples.push(sample);
            }
            ControlFlow::Continue(())
        });
        (samples, result)
    }

    fn shape(samples: &[Sample]) -> Vec<String> {
        samples
            .iter()
            .map(|s| {
                format!(
                    "{}:{}",
                    s.key,
                    s.members.keys().cloned().collect::<Vec<_>>().join(",")
                )
            })
            .collect()
    }

    #[test]
    fn tar_reader_groups_members_by_key() {
        let long = format!("{}/x.jpg", "folder".repeat(30));
        let (samples, result) = read(&tar_of(&[
            ("a.jpg", b"1"),
            ("a.json", b"{}"),
            ("README", b"ignored"),
            ("a.TXT", b"t"),
            ("b.jpg", b"2"),
            ("b.jpg", b"3"),
            (&long, b"4"),
        ]));
        result.unwrap();
        let long_key = long.trim_end_matches(".jpg");
        assert_eq!(
            shape(&samples),
            [
                "a:jpg,json,txt",
                "b:jpg",
                "b:jpg",
                &format!("{long_key}:jpg")
            ]
        );
    }

    #[test]
    fn tar_reader_passes_over_folders_links_and_odd_names() {
        let mut builder = tar::Builder::new(Vec::new());
        for (kind, path) in [
            (tar::EntryType::Directory, "a.jpg/"),
            (tar::EntryType::Symlink, "b.jpg"),
            (tar::EntryType::Link, "c.jpg"),
            (tar::EntryType::Regular, "README"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            if !matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link) {
                header.set_cksum();
                builder.append_data(&mut header, path, &b""[..]).unwrap();
            } else {
                builder
                    .append_link(&mut header, path, "/etc/passwd")
                    .unwrap();
            }
        }
        let mut passed_over = Vec::new();
        let tar = builder.into_inner().unwrap();
        let options = TarOptions {
            max_member_bytes: 1000,
            max_tail_bytes: TAIL_BYTES,
        };
        read_samples(tar.as_slice(), options, |found| {
            match found {
                TarItem::Sample(sample) => panic!("{sample:?}"),
                TarItem::Trailing(_) => {}
                TarItem::PassedOver(PassedOver { path, kind }) => passed_over.push((path, kind)),
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(
            passed_over,
            [
                ("a.jpg/".to_owned(), PassedOverKind::Folder),
                ("b.jpg".to_owned(), PassedOverKind::Link),
                ("c.jpg".to_owned(), PassedOverKind::Link),
                ("README".to_owned(), PassedOverKind::Name),
            ]
        );
    }

    #[test]
    fn tar_reader_keeps_samples_before_a_cut() {
        let tar = tar_of(&[
            ("a.jpg", &[1; 600]),
            ("b.jpg", &[2; 600]),
            ("c.jpg", &[3; 600]),
        ]);
        let (samples, result) = read(&tar[..512 + 1024 + 512 + 100]);
        let message = result.unwrap_err().to_string();
        assert_eq!(
            message,
            "ends inside member \"b.jpg\", after 100 of 600 bytes"
        );
        assert_eq!(shape(&samples), ["a:jpg"]);
        // Inside c's header: b might have had more members.
        let (samples, result) = read(&tar[..2 * 1536 + 100]);
        assert!(matches!(result, Err(TarError::Broken(_))), "{result:?}");
        assert_eq!(shape(&samples), ["a:jpg"]);
    }

    #[test]
    fn tar_reader_accepts_missing_end_blocks() {
        let tar = tar_of(&[("a.jpg", &[1; 600])]);
        let (samples, result) = read(&tar[..1536]);
        result.unwrap();
        assert_eq!(shape(&samples), ["a:jpg"]);
    }

    #[test]
    fn tar_reader_tells_other_files_from_broken_tars() {
        let page = [
            b"<html><body>403 Forbidden</body></html>".as_slice(),
            &[b' '; 600],
        ]
        .concat();
        for content in [page.as_slice(), b"short", &[7; 5000], b"BZh91AY&SY"] {
            let (_, result) = read(content);
            assert!(matches!(result, Err(TarError::NotATar(_))), "{result:?}");
        }
        let message = |content: &[u8]| read(content).1.unwrap_err().to_string();
        let html = "it is an HTML page, such as a login page or an error page";
        assert_eq!(message(&page), format!("is not a tar: {html}"));
        assert_eq!(
            message(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
            "is not a tar: it is a git-lfs pointer; run `git lfs pull` in its repository"
        );
        assert_eq!(
            message(&gzip(b"{\"error\": \"expired\"}")),
            "is not a tar: it is JSON ({\"error\": \"expired\"}) in gzip"
        );
        assert_eq!(message(b"short"), "is not a tar: it is text (short)");
        // A tar may begin like another file.
        let (samples, result) = read(&tar_of(&[("BZh91.jpg", b"1"), ("{}.jpg", b"2")]));
        result.unwrap();
        assert_eq!(shape(&samples), ["BZh91:jpg", "{}:jpg"]);
    }

    #[test]
    fn tar_reader_names_oversized_members() {
        let (samples, result) = read(&tar_of(&[("a.jpg", &[1; 2000]), ("a.txt", b"t")]));
        result.unwrap();
        assert_eq!(shape(&samples), ["a:txt"]);
        assert_eq!(samples[0].oversized["jpg"], 2000);
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn tar_reader_reads_gzip() {
        let tar = tar_of(&[("a.jpg", &[1; 600]), ("a.txt", b"t"), ("b.jpg", &[2; 600])]);
        let (samples, result) = read(&gzip(&tar));
        result.unwrap();
        assert_eq!(samples, read(&tar).0);
        // In two members, cut anywhere.
        let (samples, result) = read(&[gzip(&tar[..700]), gzip(&tar[700..])].concat());
        result.unwrap();
        assert_eq!(samples, read(&tar).0);
    }

    #[test]
    fn tar_reader_reports_faulty_gzip_as_broken() {
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
            .take(600)
            .collect();
        let tar = tar_of(&[
            ("a.jpg", &noise),
            ("b.jpg", &noise[..500]),
            ("c.jpg", &noise[..90]),
        ]);
        let whole = gzip(&tar);
        let broken = |gzip: &[u8]| {
            let (samples, result) = read(gzip);
            match result.unwrap_err() {
                TarError::Broken(cause) => (samples.len(), cause),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(broken(&whole[..20]), (0, "the gzip is cut off".to_owned()));
        let (samples, cause) = broken(&whole[..whole.len() - 4]);
        assert_eq!(
            (samples, cause.as_str()),
            (3, "the gzip is cut off after member \"c.jpg\"")
        );
        // The checksum at the very end, after the tar's own end.
        let mut damaged = whole.clone();
        damaged[whole.len() - 8] ^= 1;
        let (samples, cause) = broken(&damaged);
        assert!(
            samples == 3 && cause.starts_with("the gzip is damaged"),
            "{cause}"
        );
        // A gzip without a tar is not a shard.
        let (_, result) = read(&gzip(&[7; 5000]));
        assert!(matches!(result, Err(TarError::NotATar(_))), "{result:?}");
        assert_eq!(broken(b""), (0, "is empty: 0 bytes".to_owned()));
    }

    #[test]
    fn tar_reader_never_panics() {
        let whole = tar_of(&[("a.jpg", &[1; 600]), ("a.txt", b"t"), ("b.jpg", &[2; 600])]);
        let mut generator = fastrand::Rng::with_seed(3);
        for _ in 0..2000 {
            let mut damaged = whole.clone();
            for _ in 0..generator.usize(1..4) {
                let at = generator.usize(0..damaged.len());
                damaged[at] = generator.u8(..);
            }
            damaged.truncate(generator.usize(0..=damaged.len()));
            // Must not panic.
            let _ = read(&damaged);
            let mut damaged = gzip(&whole);
            let at = generator.usize(0..damaged.len());
            damaged[at] = generator.u8(..);
            damaged.truncate(generator.usize(0..=damaged.len()));
            let _ = read(&damaged);
        }
    }
}
