//! A sample as it is in a shard: a key and its members, still compressed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::limits::{MAX_SAMPLE_BYTES, MAX_SAMPLE_MEMBERS};

/// The members of a shard that share a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The members' common path, up to the first `.` of the file name; bytes that are not UTF-8 are
    /// replaced by `U+FFFD`.
    pub key: Arc<str>,
    /// Extension (lower case, without its first dot: `jpg`, `seg.png`) to content.
    pub members: BTreeMap<String, Bytes>,
    /// Extensions of members that were not read because they are too large, with their sizes.
    pub oversized: BTreeMap<String, u64>,
    /// Extensions of members that nothing reads, with their first bytes.
    pub others: BTreeMap<String, Bytes>,
    /// The limit that the sample exceeds. It then has no members.
    pub excess: Option<Excess>,
    /// Whether an adjacent sample has the same key, because an extension is repeated.
    pub is_part: bool,
}

/// A limit of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Excess {
    /// The number of members.
    Members,
    /// The size of the members, and of their names.
    Bytes,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Members => write!(f, "has more than {MAX_SAMPLE_MEMBERS} members"),
            Self::Bytes => write!(f, "has more than {MAX_SAMPLE_BYTES} bytes of members"),
        }
    }
}

impl Sample {
    pub(crate) fn new(key: &[u8]) -> Self {
        Self {
            key: Arc::from(String::from_utf8_lossy(key)),
            members: BTreeMap::new(),
            oversized: BTreeMap::new(),
            others: BTreeMap::new(),
            excess: None,
            is_part: false,
        }
    }

    /// The first of `extensions` this sample has, with its content.
    #[must_use]
    pub fn pick(&self, extensions: &[String]) -> Option<(&str, &Bytes)> {
        extensions
            .iter()
            .find_map(|wanted| self.members.get_key_value(wanted.as_str()))
            .map(|(extension, content)| (extension.as_str(), content))
    }

    /// Size of the members. Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.members.values().map(Bytes::len).sum()
    }

    /// Size of the members, of the starts of others, and of all names. Bytes.
    pub(crate) fn held_bytes(&self) -> usize {
        let contents = self.members.iter().chain(&self.others);
        let contents: usize = contents
            .map(|(name, content)| name.len() + content.len())
            .sum();
        let names: usize = self.oversized.keys().map(String::len).sum();
        self.key.len() + contents + names
    }

    /// The extensions of all members, also of those that are not held.
    pub(crate) fn extensions(&self) -> impl Iterator<Item = &str> {
        let held = self.members.keys().chain(self.oversized.keys());
        held.chain(self.others.keys()).map(String::as_str)
    }

    pub(super) fn has(&self, extension: &str) -> bool {
        self.members.contains_key(extension)
            || self.oversized.contains_key(extension)
            || self.others.contains_key(extension)
    }

    /// Drops the members of a sample that exceeds a limit.
    pub(super) fn exceed(&mut self, excess: Excess) {
        self.members.clear();
        self.oversized.clear();
        self.others.clear();
        self.excess = Some(excess);
    }
}

/// Splits a member's path as webdataset's `base_plus_ext`: the key goes up to the first `.` of the
/// file name, the extension is the rest in lower case. `None` for files that belong to no sample: names without an
/// extension, hidden files, and webdataset's own `__meta__` entries and folders.
pub(crate) fn split_name(path: &[u8]) -> Option<(&[u8], String)> {
    let mut path = path;
    while let Some(rest) = path.strip_prefix(b"./") {
        path = rest;
    }
    let first = path.split(|&byte| byte == b'/').next()?;
    if first.len() >= 4 && first.starts_with(b"__") && first.ends_with(b"__") {
        return None;
    }
    let name_at = path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    let name = &path[name_at..];
    let dot = name.iter().position(|&byte| byte == b'.')?;
    if dot == 0 || dot + 1 == name.len() {
        return None;
    }
    let extension = String::from_utf8_lossy(&name[dot + 1..]).to_lowercase();
    Some((&path[..name_at + dot], extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_name_splits_as_base_plus_ext() {
        let split = |path: &str| {
            split_name(path.as_bytes())
                .map(|(key, extension)| (String::from_utf8(key.to_vec()).unwrap(), extension))
        };
        let pair = |key: &str, extension: &str| Some((key.to_owned(), extension.to_owned()));
        assert_eq!(split("00012.jpg"), pair("00012", "jpg"));
        assert_eq!(split("a.b/c.d/e.seg.PNG"), pair("a.b/c.d/e", "seg.png"));
        assert_eq!(split("./é/名.Json"), pair("é/名", "json"));
        assert_eq!(split("README"), None);
        assert_eq!(split("a/.hidden"), None);
        assert_eq!(split("a/._x.jpg"), None);
        assert_eq!(split("a."), None);
        assert_eq!(split("__meta.x__"), None);
        assert_eq!(split("__meta__/x.json"), None);
        assert_eq!(split("__x.jpg"), pair("__x", "jpg"));
        assert_eq!(split("a/__x.y__"), pair("a/__x", "y__"));
        assert_eq!(split("a..jpg"), pair("a", ".jpg"));
        assert_eq!(split(""), None);
    }

    #[test]
    fn sample_pick_follows_the_order_of_keys() {
        let mut sample = Sample::new(b"k");
        sample
            .members
            .insert("png".into(), Bytes::from_static(b"p"));
        sample
            .members
            .insert("jpg".into(), Bytes::from_static(b"j"));
        let keys = |keys: &[&str]| keys.iter().map(|k| (*k).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            sample.pick(&keys(&["webp", "jpg", "png"])).unwrap().0,
            "jpg"
        );
        assert_eq!(sample.pick(&keys(&["png", "jpg"])).unwrap().0, "png");
        assert!(sample.pick(&keys(&["gif"])).is_none());
        assert_eq!(sample.bytes(), 2);
    }
}
