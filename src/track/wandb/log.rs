//! The log format of W&B's offline runs: LevelDB's, with a header of its own and a plain CRC-32.
//!
//! A record is divided into chunks that don't cross a block of 32 KiB: checksum of type and content, length, type, content;
//! little-endian. A block's last bytes are zero where a chunk's head does not fit.

/// Start of a file: identifier, magic number and version.
pub(super) const HEADER: [u8; 7] = *b":W&B\xe1\xbe\x00";
const BLOCK: usize = 32 * 1024;
/// Bytes before a chunk's content.
const HEAD: usize = 7;

const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

fn checksum(kind: u8, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(content);
    hasher.finalize()
}

/// Appends `content` as a record. `position`: size of the file up to the start of `bytes`.
pub(super) fn append(content: &[u8], position: u64, bytes: &mut Vec<u8>) {
    let mut rest = content;
    let mut begun = false;
    loop {
        let offset = (position as usize + bytes.len()) % BLOCK;
        let mut room = BLOCK - offset;
        if room < HEAD {
            bytes.resize(bytes.len() + room, 0);
            room = BLOCK;
        }
        let (chunk, after) = rest.split_at(rest.len().min(room - HEAD));
        let kind = match (begun, after.is_empty()) {
            (false, true) => WHOLE,
            (false, false) => FIRST,
            (true, false) => MIDDLE,
            (true, true) => LAST,
        };
        bytes.extend(checksum(kind, chunk).to_le_bytes());
        // At most BLOCK - HEAD.
        bytes.extend((chunk.len() as u16).to_le_bytes());
        bytes.push(kind);
        bytes.extend(chunk);
        if after.is_empty() {
            return;
        }
        (rest, begun) = (after, true);
    }
}

/// Reads the records of a file's bytes.
#[derive(Debug)]
pub(super) struct Records<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Records<'a> {
    /// `None` if `bytes` don't start with [`HEADER`].
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        bytes.starts_with(&HEADER).then_some(Self {
            bytes,
            position: HEADER.len(),
        })
    }

    /// End of the last record that was read. Bytes.
    pub(super) fn position(&self) -> u64 {
        self.position as u64
    }

    /// Content of the next record; `None` at the end of the file and at a truncated or damaged record.
    pub(super) fn next_whole(&mut self) -> Option<Vec<u8>> {
        let (mut content, mut begun) = (Vec::new(), false);
        let mut at = self.position;
        loop {
            let room = BLOCK - at % BLOCK;
            if room < HEAD {
                at += room;
            }
            let (head, rest) = self.bytes.get(at..)?.split_first_chunk::<HEAD>()?;
            let [a, b, c, d, low, high, kind] = *head;
            let length = usize::from(u16::from_le_bytes([low, high]));
            let chunk = rest.get(..length)?;
            let begins = kind == WHOLE || kind == FIRST;
            if begins == begun || checksum(kind, chunk) != u32::from_le_bytes([a, b, c, d]) {
                return None;
            }
            begun = true;
            content.extend(chunk);
            at += HEAD + length;
            if kind == WHOLE || kind == LAST {
                self.position = at;
                return Some(content);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (Vec<Vec<u8>>, u64) {
        let mut records = Records::new(bytes).unwrap();
        let contents = std::iter::from_fn(|| records.next_whole()).collect();
        (contents, records.position())
    }

    #[test]
    fn record_bytes_equal_wandbs() {
        let mut bytes = Vec::new();
        append(b"abc", 7, &mut bytes);
        // zlib.crc32(b"\x01abc")
        assert_eq!(bytes, [0xa9, 0x20, 0x9d, 0x53, 3, 0, 1, b'a', b'b', b'c']);
    }

    #[test]
    fn records_of_every_size_around_a_block_are_read_back() {
        let mut file = HEADER.to_vec();
        let mut contents = Vec::new();
        // Ends of records at each offset near the end of a block, and records of several blocks.
        for size in (BLOCK - 40..BLOCK + 10).chain([1, 3 * BLOCK, 2 * BLOCK - 2 * HEAD, 5]) {
            let content: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            let mut bytes = Vec::new();
            append(&content, file.len() as u64, &mut bytes);
            file.extend(bytes);
            contents.push(content);
        }
        assert_eq!(read(&file), (contents, file.len() as u64));
    }

    #[test]
    fn reader_stops_at_truncation_or_damage() {
        let mut file = HEADER.to_vec();
        let mut ends = vec![file.len()];
        for content in [&[1; 20][..], &[2; 9], &[3; 30]] {
            let mut bytes = Vec::new();
            append(content, file.len() as u64, &mut bytes);
            file.extend(bytes);
            ends.push(file.len());
        }
        for cut in HEADER.len()..file.len() {
            let (contents, position) = read(&file[..cut]);
            assert_eq!(position, ends[contents.len()] as u64);
            assert!(ends[contents.len() + 1] > cut);
        }
        for byte in HEADER.len()..file.len() {
            let mut damaged = file.clone();
            damaged[byte] ^= 0x40;
            let before = ends.iter().filter(|&&end| end <= byte).count() - 1;
            assert_eq!(read(&damaged).0.len(), before, "byte {byte}");
        }
        assert!(Records::new(b"other").is_none());
    }
}
