//! A kept shard on disk: its bytes as they are, and after them what is known of it.
//!
//! The knowledge stands at the end, where a tar's readers no longer look: a kept tar can be opened by
//! any of them. Layout: the object's bytes; JSON; the JSON's length (8 bytes, little endian); 8 bytes
//! that tell the format.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

use crate::source::remote::Known;

const FORMAT: &[u8; 8] = b"coffey-1";
const FOOTER_BYTES: u64 = 16;
const MOST_JSON_BYTES: u64 = 64 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct About {
    /// For people.
    url: String,
    version: Option<String>,
    size: u64,
}

/// Writes what is known of an object after its bytes.
pub(super) fn seal(file: &mut impl Write, url: &str, known: &Known) -> io::Result<()> {
    let about = About {
        url: url.to_owned(),
        version: known.version.clone(),
        size: known.size,
    };
    let json = serde_json::to_vec(&about)?;
    file.write_all(&json)?;
    file.write_all(&(json.len() as u64).to_le_bytes())?;
    file.write_all(FORMAT)
}

/// Reads what is known of a kept object, and goes back to its first byte; `None` if the file is not
/// what [`seal`] leaves.
pub(super) fn unseal(file: &mut File) -> io::Result<Option<Known>> {
    let length = file.metadata()?.len();
    if length < FOOTER_BYTES {
        return Ok(None);
    }
    let mut footer = [0; FOOTER_BYTES as usize];
    file.seek(SeekFrom::Start(length - FOOTER_BYTES))?;
    file.read_exact(&mut footer)?;
    let (json_bytes, format) = footer.split_at(8);
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
    let about: Option<About> = serde_json::from_slice(&json).ok();
    Ok(about.filter(|about| about.size == size).map(|about| Known {
        version: about.version,
        size,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_read_back_and_nothing_else() {
        let known = Known {
            version: Some("\"tag\"".to_owned()),
            size: 5,
        };
        let mut whole = b"bytes".to_vec();
        seal(&mut whole, "s3://b/k.tar", &known).unwrap();
        let read = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            let known = unseal(&mut file).unwrap();
            (known.is_some()).then(|| assert_eq!(file.stream_position().unwrap(), 0));
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
