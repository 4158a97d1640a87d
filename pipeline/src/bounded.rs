//! Reading whole files and responses, up to a limit: none of them can take all memory.

use std::io::{self, Read};
use std::path::Path;

use crate::plural::counted;
use crate::regular_file;

/// Most bytes of a JSON file of a model, of a manifest or of a checkpoint's record.
pub const MAX_FILE_BYTES: u64 = 1 << 28;
/// Most bytes of one response of an API: a page of a listing, a list of files.
pub const MAX_RESPONSE_BYTES: u64 = 16 << 20;

/// The content is larger than what is read of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("has {}; at most {most} are read", match size {
    Some(size) => counted(*size, "byte"),
    None => format!("more than {}", counted(*most, "byte")),
})]
pub struct TooLong {
    /// The size, if it is given before the content. Bytes.
    pub size: Option<u64>,
    /// The limit. Bytes.
    pub most: u64,
}

/// Content that is collected piece by piece, up to a limit.
#[derive(Debug)]
pub struct BoundedBytes {
    most: u64,
    content: Vec<u8>,
}

impl BoundedBytes {
    /// Begins to collect at most `most` bytes.
    ///
    /// # Errors
    /// [`TooLong`] if the content has a `size` above that.
    pub fn new(most: u64, size: Option<u64>) -> Result<Self, TooLong> {
        if size.is_some_and(|size| size > most) {
            return Err(TooLong { size, most });
        }
        let content = Vec::new();
        Ok(Self { most, content })
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// [`TooLong`] if the content is then longer than the limit.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), TooLong> {
        if (self.content.len() + piece.len()) as u64 > self.most {
            return Err(TooLong {
                size: None,
                most: self.most,
            });
        }
        self.content.extend_from_slice(piece);
        Ok(())
    }

    /// The content so far.
    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        self.content
    }
}

/// Reads `reader` to its end.
///
/// # Errors
/// The reader's error, or [`TooLong`] if there are more than `most` bytes.
pub fn read(reader: impl Read, most: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    reader
        .take(most.saturating_add(1))
        .read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(io::Error::other(TooLong { size: None, most }));
    }
    Ok(content)
}

/// Reads a regular file of at most `most` bytes.
///
/// # Errors
/// The error of the read, or [`TooLong`].
pub fn read_file(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = regular_file::open(path)?;
    let size = file.metadata()?.len();
    if size > most {
        let size = Some(size);
        return Err(io::Error::other(TooLong { size, most }));
    }
    read(file, most)
}

/// Reads a regular file of at most `most` bytes, as text.
///
/// # Errors
/// The error of the read, [`TooLong`], or [`io::ErrorKind::InvalidData`] unless it is UTF-8.
pub fn read_text_file(path: &Path, most: u64) -> io::Result<String> {
    let content = read_file(path, most)?;
    String::from_utf8(content).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_bytes_end_at_the_limit() {
        let mut bytes = BoundedBytes::new(5, Some(5)).unwrap();
        bytes.push(b"abc").unwrap();
        bytes.push(b"de").unwrap();
        let error = bytes.push(b"f").unwrap_err();
        assert_eq!(
            error.to_string(),
            "has more than 5 bytes; at most 5 are read"
        );
        assert_eq!(bytes.into_vec(), b"abcde");
        let error = BoundedBytes::new(5, Some(6)).unwrap_err();
        assert_eq!(error.to_string(), "has 6 bytes; at most 5 are read");
    }

    #[test]
    fn bounded_read_ends_at_the_limit() {
        assert_eq!(read(b"abcde".as_slice(), 5).unwrap(), b"abcde");
        let error = read(io::repeat(0), 1000).unwrap_err();
        assert!(error.to_string().starts_with("has more than 1000 bytes"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abcde").unwrap();
        assert_eq!(read_file(file.path(), 5).unwrap(), b"abcde");
        let error = read_file(file.path(), 4).unwrap_err();
        assert_eq!(error.to_string(), "has 5 bytes; at most 4 are read");
    }
}
