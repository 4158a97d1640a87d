//! TensorFlow's record format: length, checksum of the length, content, checksum of the content; little-endian.

use std::io::{ErrorKind, Read};

/// Bytes before a record's content.
const HEAD: usize = 12;
/// Bytes after a record's content.
const TAIL: usize = 4;

/// TensorFlow's masked CRC-32C: rotated and shifted, for data that contains checksums.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
        .to_le_bytes()
}

/// Appends the record of `content`.
pub(super) fn frame(content: &[u8], record: &mut Vec<u8>) {
    let length = (content.len() as u64).to_le_bytes();
    record.extend(length);
    record.extend(checksum(&length));
    record.extend(content);
    record.extend(checksum(content));
}

/// Reads the records of a file.
#[derive(Debug)]
pub(super) struct RecordReader<R> {
    reader: R,
    length: u64,
    position: u64,
    content: Vec<u8>,
}

impl<R: Read> RecordReader<R> {
    /// `length`: size of the file in bytes.
    pub(super) fn new(reader: R, length: u64) -> Self {
        Self {
            reader,
            length,
            position: 0,
            content: Vec::new(),
        }
    }

    /// End of the last complete record. Bytes.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Content of the next record; `None` at the end of the file and at a truncated or damaged record.
    pub(super) fn next_whole(&mut self) -> std::io::Result<Option<&[u8]>> {
        let mut head = [0; HEAD];
        if !self.fill(&mut head)? {
            return Ok(None);
        }
        let [a, b, c, d, e, f, g, h, sum @ ..] = head;
        let length_bytes = [a, b, c, d, e, f, g, h];
        let length = u64::from_le_bytes(length_bytes);
        let left = self.length.saturating_sub(self.position);
        let overhead = (HEAD + TAIL) as u64;
        if sum != checksum(&length_bytes) || length > left.saturating_sub(overhead) {
            return Ok(None);
        }
        let mut content = std::mem::take(&mut self.content);
        content.resize(length as usize, 0);
        let mut sum = [0; TAIL];
        let whole = self.fill(&mut content)? && self.fill(&mut sum)? && sum == checksum(&content);
        self.content = content;
        if !whole {
            return Ok(None);
        }
        self.position += overhead + length;
        Ok(Some(&self.content))
    }

    /// Fills `buffer`; `false` if the file ends before.
    fn fill(&mut self, buffer: &mut [u8]) -> std::io::Result<bool> {
        match self.reader.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_bytes_equal_tensorboards() {
        let mut record = Vec::new();
        frame(b"abc", &mut record);
        // Written by tensorboard's RecordWriter.
        let expected = [
            3, 0, 0, 0, 0, 0, 0, 0, 0xb0, 0x99, 0x49, 0x0e, b'a', b'b', b'c', 0x6e, 0x57, 0xf1,
            0x21,
        ];
        assert_eq!(record, expected);
    }

    #[test]
    fn record_reader_stops_at_truncation_or_damage() {
        let mut file = Vec::new();
        for content in [&b"first"[..], b"", b"third"] {
            frame(content, &mut file);
        }
        let read = |bytes: &[u8]| {
            let mut records = RecordReader::new(bytes, bytes.len() as u64);
            let mut found = Vec::new();
            while let Some(content) = records.next_whole().unwrap() {
                found.push(content.to_vec());
            }
            (found.len(), records.position())
        };
        let ends = [0, 21, 37, 58];
        assert_eq!(file.len() as u64, ends[3]);
        for cut in 0..=file.len() {
            let (count, position) = read(&file[..cut]);
            assert_eq!(position, ends[count]);
            assert!(ends[count] <= cut as u64);
            assert!(ends.get(count + 1).is_none_or(|&next| next > cut as u64));
        }
        for byte in 0..file.len() {
            let mut damaged = file.clone();
            damaged[byte] ^= 0x40;
            let before = ends.iter().filter(|&&end| end <= byte as u64).count() - 1;
            assert_eq!(read(&damaged).0, before, "byte {byte}");
        }
    }
}
