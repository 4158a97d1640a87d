//! Entry points of the fuzzer: each function parses untrusted bytes and checks the invariants of the result.
//!
//! The targets in `fuzz/` call these functions. The tests below run them over the seeds and over the inputs that
//! fuzzing has found.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::ControlFlow;

use crate::Cursor;
use crate::image::{DecodeError, decode, probe};
use crate::json::{Document, from_slice};
use crate::net::content_range as read_content_range;
use crate::shard::{
    Filter, FilterState, HeldMembers, Sample, ShardUrl, TAIL_BYTES, TarItem, TarOptions, expand,
    read_samples,
};

const MAX_MEMBER_BYTES: u64 = 1 << 14;
const MAX_PIXELS: u64 = 1 << 12;

/// A reader that returns at most 7 bytes at a time.
struct ShortReads<'a>(&'a [u8]);

impl Read for ShortReads<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = buffer.len().min(7);
        self.0.read(&mut buffer[..length])
    }
}

fn samples(reader: impl Read) -> (Vec<Sample>, Result<(), String>) {
    let mut samples = Vec::new();
    let options = TarOptions {
        held: HeldMembers::default().with(["jpg", "json", "txt"], MAX_MEMBER_BYTES),
        max_tail_bytes: TAIL_BYTES,
    };
    let result = read_samples(reader, &options, |item| {
        if let TarItem::Sample(sample) = item {
            samples.push(sample);
        }
        ControlFlow::Continue(())
    });
    (samples, result.map_err(|error| error.to_string()))
}

/// Reads a shard. The samples must not depend on the sizes of the reads.
pub fn tar(bytes: &[u8]) {
    let whole = samples(bytes);
    for sample in &whole.0 {
        let has_members = sample.excess.is_some() || sample.extensions().next().is_some();
        assert!(has_members, "a sample without members");
        let largest = sample.members.values().map(bytes::Bytes::len).max();
        assert!(largest.unwrap_or(0) as u64 <= MAX_MEMBER_BYTES);
    }
    assert_eq!(whole, samples(ShortReads(bytes)));
}

/// Expands each line as a pattern of shard URLs. Each URL must parse again to itself.
pub fn urls(bytes: &[u8]) {
    let patterns: Vec<String> = String::from_utf8_lossy(bytes)
        .lines()
        .map(str::to_owned)
        .collect();
    let Ok(urls) = expand(&patterns) else { return };
    assert!(!urls.is_empty());
    for url in urls.iter().take(100) {
        assert_eq!(Ok(url), url.whole().parse::<ShardUrl>().as_ref());
        assert!(!url.name().contains('/'));
        // Must not panic.
        drop((url.to_string(), url.is_folder()));
    }
}

/// Reads a JSON document. Its text must read again to itself.
pub fn json(bytes: &[u8]) {
    drop(from_slice::<serde_json::Value>(bytes));
    let Ok(document) = Document::parse(bytes) else {
        return;
    };
    assert_eq!(Document::parse(document.text().as_bytes()), Ok(document));
}

/// Filters a sample. The first line is the caption, the rest the json.
pub fn filter(bytes: &[u8]) {
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
    let caption = String::from_utf8_lossy(lines.next().unwrap_or_default());
    let json = Document::parse(lines.next().unwrap_or_default()).ok();
    let mut state = FilterState::new(Filter {
        min_size: Some(512),
        max_pwatermark: Some(0.5),
        max_punsafe: Some(0.5),
        min_similarity: Some(0.3),
        min_aesthetic: Some(5.0),
        min_caption_chars: Some(3),
        max_caption_chars: Some(100),
    });
    let verdict = state.check(json.as_ref(), &caption);
    if verdict.is_ok() {
        assert!(json.is_some() && (3..=100).contains(&caption.chars().count()));
    }
}

/// Decodes an image. Its size must be the header's, and within the limit.
pub fn image(bytes: &[u8]) {
    let probed = probe(bytes);
    match decode(bytes, MAX_PIXELS) {
        Ok(decoded) => {
            let (width, height) = decoded.pixels.dimensions();
            assert_eq!(probed, Ok((decoded.format, width, height)));
            assert!(u64::from(width) * u64::from(height) <= MAX_PIXELS);
        }
        Err(DecodeError::TooLarge { .. }) => assert!(probed.is_ok()),
        Err(_) => {}
    }
}

/// Reads a `Content-Range` header.
pub fn content_range(bytes: &[u8]) {
    // Must not panic.
    let _ = read_content_range(&String::from_utf8_lossy(bytes));
}

/// Reads a cursor. Each cursor that can be read must survive writing and reading.
pub fn cursor(bytes: &[u8]) {
    let Ok(cursor) = serde_json::from_slice::<Cursor>(bytes) else {
        return;
    };
    let written = serde_json::to_vec(&cursor).unwrap_or_default();
    assert_eq!(serde_json::from_slice(&written).ok(), Some(cursor));
}

/// All entry points, by the name of the target.
#[must_use]
pub fn entries() -> BTreeMap<&'static str, fn(&[u8])> {
    BTreeMap::from([
        ("content_range", content_range as fn(&[u8])),
        ("cursor", cursor),
        ("filter", filter),
        ("image", image),
        ("json", json),
        ("tar", tar),
        ("urls", urls),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn fuzz_entries_survive_all_seeds() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
        for (name, entry) in entries() {
            let files: Vec<_> = std::fs::read_dir(seeds.join(name)).unwrap().collect();
            assert!(!files.is_empty(), "{name} has no seeds");
            for file in files {
                let path = file.unwrap().path();
                println!("{}", path.display());
                entry(&std::fs::read(path).unwrap());
            }
        }
    }

    #[test]
    fn fuzz_seeds_are_what_their_names_say() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
        for file in std::fs::read_dir(seeds.join("image")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if !name.starts_with("found-") {
                let decoded = decode(&std::fs::read(path).unwrap(), MAX_PIXELS).unwrap();
                assert!(name.starts_with(decoded.format), "{name}");
            }
        }
        for file in std::fs::read_dir(seeds.join("tar")).unwrap() {
            let path = file.unwrap().path();
            if !path.to_string_lossy().contains("found-") {
                let (read, result) = samples(std::fs::read(&path).unwrap().as_slice());
                assert!(result.is_ok() && !read.is_empty(), "{}", path.display());
            }
        }
        let usual = std::fs::read(seeds.join("cursor/usual")).unwrap();
        serde_json::from_slice::<Cursor>(&usual).unwrap();
    }
}
