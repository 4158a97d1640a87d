//! A cached shard on disk: the bytes of the object, and after them its version and their SHA-256.
//!
//! Tar readers stop before the end of the file, so a cached tar can be opened by any of them. Layout:
//! the object's bytes; JSON; the JSON's length (8 bytes, little endian); 8 bytes that name the format.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

use crate::source::remote::ObjectVersion;

const FORMAT: &[u8; 8] = b"coffey-1";
const FOOTER_BYTES: u64 = 16;
const MOST_JSON_BYTES: u64 = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct Footer {
    /// For a reader of the file.
    url: String,
    version: Option<String>,
    size: u64,
    /// Hexadecimal; `None` in files of versions before it was kept.
    sha256: Option<String>,
}

/// Version and hash of a cached object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) object: ObjectVersion,
    /// SHA-256 of the bytes, hexadecimal.
    pub(super) sha256: Option<String>,
}

/// Writes what is known of an object after its bytes.
pub(super) fn seal(file: &mut impl Write, url: &str, kept: &Kept) -> io::Result<()> {
    let footer = Footer {
        url: url.to_owned(),
        version: kept.object.version.clone(),
        size: kept.object.size,
        sha256: kept.sha256.clone(),
    };
    let json = serde_json::to_vec(&footer)?;
    file.write_all(&json)?;
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(FORMAT)
}

/// Reads what is known of a cached object and rewinds the file; `None` if [`seal`] did not complete it.
pub(super) fn unseal(file: &mut File) -> io::Result<Option<Kept>> {
    let length = file.metadata()?.len();
    if length < FOOTER_BYTES {
        return Ok(None);
    }
    let mut end = [0; FOOTER_BYTES as usize];
    file.seek(SeekFrom::Start(length - FOOTER_BYTES))?;
    file.read_exact(&mut end)?;
    let (json_bytes, format) = end.split_at(8);
    let json_bytes = json_bytes
        .iter()
        .rev()
        .fold(0_u64, |all, byte| (all << 8) | u64::from(*byte));
    if format != FORMAT || json_bytes > MOST_JSON_BYTES || json_bytes > length - FOOTER_BYTES {
        return Ok(None);
    }
    let size = length - FOOTER_BYTES - json_bytes;
    let mut json = Vec::new();
    file.seek(SeekFrom::Start(size))?;
    file.take(json_bytes).read_to_end(&mut json)?;
    file.rewind()?;
    let footer: Option<Footer> = serde_json::from_slice(&json).ok();
    let footer = footer.filter(|footer| footer.size == size);
    Ok(footer.map(|footer| Kept {
        object: ObjectVersion {
            version: footer.version,
            size,
        },
        sha256: footer.sha256,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_file_is_read_back_only_when_whole() {
        let known = Kept {
            object: ObjectVersion {
                version: Some("\"tag\"".to_owned()),
                size: 5,
            },
            sha256: Some("00".repeat(32)),
        };
        let mut whole = b"bytes".to_vec();
        seal(&mut whole, "s3://b/k.tar", &known).unwrap();
        let read = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            let known = unseal(&mut file).unwrap();
            if known.is_some() {
                assert_eq!(file.stream_position().unwrap(), 0);
            }
            known
        };
        assert_eq!(read(&whole), Some(known));
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]), None, "cut at {end}");
        }
        assert_eq!(read(&whole[1..]), None, "cut at its beginning");
        let mut wild = whole.clone();
        let at = wild.len() - 10;
        wild[at] = 0xff;
        assert_eq!(read(&wild), None);
    }
}
