//! Gzip around a tar: detected from the content, and decompressed while it is read.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;

const GZIP: &[u8] = &[0x1f, 0x8b];

/// Decompressed bytes from which the ratio is limited.
const UNLIMITED_BYTES: u64 = 1 << 30;
/// Most decompressed bytes for each compressed byte. Images shrink little, and deflate reaches 1032.
const MAX_RATIO: u64 = 256;

/// Whether a file that begins with these bytes is in gzip.
pub(super) fn is_gzip(start: &[u8]) -> bool {
    start.starts_with(GZIP)
}

/// A fault of the gzip, to be told from a fault of the tar in it.
#[derive(Debug)]
pub(super) struct GzipFault(String);

impl fmt::Display for GzipFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GzipFault {}

impl GzipFault {
    fn wrap(error: &io::Error) -> io::Error {
        io::Error::other(Self(match error.kind() {
            io::ErrorKind::UnexpectedEof => "the gzip is cut off".to_owned(),
            _ => format!("the gzip is damaged: {error}"),
        }))
    }

    fn ratio(compressed: u64, written: u64) -> io::Error {
        io::Error::other(Self(format!(
            "the gzip expands {compressed} bytes to {written}, more than {MAX_RATIO} times as many"
        )))
    }

    pub(super) fn is_behind(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

/// Fills each buffer as far as there is data, so that the content of a damaged gzip does not depend on
/// the sizes of the reads.
struct Filling<R> {
    inner: R,
    /// Bytes read.
    read: u64,
}

impl<R: Read> Read for Filling<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.inner.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The next read returns the error.
                Err(_) if filled > 0 => break,
                Err(error) => return Err(error),
            }
        }
        self.read += filled as u64;
        Ok(filled)
    }
}

/// The content of a gzip with any number of members, one after another. Other data after the members is
/// ignored, as by the gzip tool.
pub(super) struct Inflate<R> {
    member: Option<GzDecoder<BufReader<Filling<R>>>>,
    /// Decompressed bytes.
    written: u64,
}

impl<R: Read> Inflate<R> {
    /// Decompresses `capacity` bytes of `inner` at once.
    pub(super) fn new(inner: R, capacity: usize) -> Self {
        let reader = BufReader::with_capacity(capacity, Filling { inner, read: 0 });
        Self {
            member: Some(GzDecoder::new(reader)),
            written: 0,
        }
    }
}

impl<R: Read> Read for Inflate<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(member) = &mut self.member {
            let count = member
                .read(buffer)
                .map_err(|error| GzipFault::wrap(&error))?;
            if count > 0 {
                self.written += count as u64;
                let compressed = member.get_ref().get_ref().read;
                if self.written > UNLIMITED_BYTES && self.written / MAX_RATIO > compressed {
                    return Err(GzipFault::ratio(compressed, self.written));
                }
                return Ok(count);
            }
            if let Some(member) = self.member.take() {
                let mut rest = member.into_inner();
                if rest.fill_buf()?.first() == GZIP.first() {
                    self.member = Some(GzDecoder::new(rest));
                }
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn inflate(gzip: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        // A small buffer, so that members end at every place in it.
        Inflate::new(gzip, 7).read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn gzip_members_are_read_one_after_another() {
        let two = [gzip(b"one, "), gzip(b""), gzip(b"two")].concat();
        assert_eq!(inflate(&two).unwrap(), b"one, two");
        let padded = [two.as_slice(), &[0; 30]].concat();
        assert_eq!(inflate(&padded).unwrap(), b"one, two");
    }

    #[test]
    fn gzip_fault_is_named() {
        let whole = gzip(&[7; 5000]);
        for end in [1, 12, whole.len() - 9, whole.len() - 1] {
            let error = inflate(&whole[..end]).unwrap_err();
            assert!(GzipFault::is_behind(&error));
            assert_eq!(error.to_string(), "the gzip is cut off", "at {end}");
        }
        let mut damaged = whole.clone();
        let crc = damaged.len() - 8;
        damaged[crc] ^= 1;
        let text = inflate(&damaged).unwrap_err().to_string();
        assert!(text.starts_with("the gzip is damaged: "), "{text}");
    }

    #[test]
    fn gzip_is_detected_from_the_content() {
        assert!(is_gzip(&gzip(b"x")));
        assert!(!is_gzip(b"00000.jpg") && !is_gzip(b""));
    }
}
