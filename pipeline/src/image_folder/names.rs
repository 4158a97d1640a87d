//! Names of files: which are members of samples, and their keys.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Extensions of image formats that are no key by default. Files with these are counted as images that can't be used, not
/// passed over.
const OTHER_IMAGES: [&str; 14] = [
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl",
    "jp2", "jfif",
];

/// Extensions of the members of a sample, in lower case and in order of preference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberKeys {
    /// Of images.
    pub images: Vec<String>,
    /// Of captions.
    pub captions: Vec<String>,
}

impl Default for MemberKeys {
    fn default() -> Self {
        let owned = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        Self {
            images: owned(&["jpg", "png", "jpeg", "webp"]),
            captions: owned(&["text", "txt", "caption"]),
        }
    }
}

/// The part that a file has in its sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemberKind {
    Image,
    Caption,
    Json,
}

impl MemberKeys {
    /// Whether a file with this name is an image.
    pub(crate) fn is_image(&self, name: &[u8]) -> bool {
        let split = self.split(name);
        split.is_some_and(|(_, kind)| kind == MemberKind::Image)
    }

    /// The place of an extension in the order of preference of images; that of an image that can't be used is the last.
    pub(super) fn rank(&self, extension: &[u8]) -> usize {
        let mut keys = self.images.iter();
        let place = keys.position(|key| extension.eq_ignore_ascii_case(key.as_bytes()));
        place.unwrap_or(self.images.len())
    }

    /// The length of a path's key, and the kind of the member. The key ends before the longest extension that is known.
    /// `None` for a file that is no member.
    pub(super) fn split(&self, path: &[u8]) -> Option<(usize, MemberKind)> {
        let images = self.images.iter().map(String::as_str);
        let captions = self.captions.iter().map(String::as_str);
        let known = images
            .map(|key| (key, MemberKind::Image))
            .chain(captions.map(|key| (key, MemberKind::Caption)))
            .chain([("json", MemberKind::Json)])
            .chain(OTHER_IMAGES.map(|key| (key, MemberKind::Image)));
        known
            .filter_map(|(key, kind)| Some((stem(path, key)?, kind)))
            .reduce(|one, other| if other.0 < one.0 { other } else { one })
    }
}

/// The length of `path` without `.extension`, if that is its end and a name is left.
fn stem(path: &[u8], extension: &str) -> Option<usize> {
    let dot = path.len().checked_sub(extension.len() + 1)?;
    let is_end = path[dot] == b'.' && path[dot + 1..].eq_ignore_ascii_case(extension.as_bytes());
    (is_end && dot > 0 && path[dot - 1] != b'/').then_some(dot)
}

/// A key as the name of a tar's member: a reader of webdataset's rules finds the same key. Dots of the file name, control
/// characters, bytes that are not UTF-8 and `%` are written as `%2E`, and so is the first `_` of `__…__`, which readers pass over.
pub(super) fn encoded(key: &[u8]) -> String {
    let name_at = key
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |at| at + 1);
    let mut text = String::new();
    let mut at = 0;
    for chunk in key.utf8_chunks() {
        for c in chunk.valid().chars() {
            let escaped = c == '%'
                || c.is_control()
                || (c == '.' && at >= name_at)
                || (at == 0 && key.starts_with(b"__"));
            if escaped {
                let mut bytes = [0; 4];
                escape(c.encode_utf8(&mut bytes).as_bytes(), &mut text);
            } else {
                text.push(c);
            }
            at += c.len_utf8();
        }
        escape(chunk.invalid(), &mut text);
        at += chunk.invalid().len();
    }
    text
}

fn escape(bytes: &[u8], text: &mut String) {
    for byte in bytes {
        text.push_str(&format!("%{byte:02X}"));
    }
}

/// The file of the sample with the encoded `key` in the folder `root`.
pub(crate) fn file_of(root: &Path, key: &str, extension: &str) -> PathBuf {
    let mut inside = decoded(key);
    inside.push(b'.');
    inside.extend_from_slice(extension.as_bytes());
    path_of(root, &inside)
}

/// The key that is [`encoded`] as `key`.
pub(super) fn decoded(key: &str) -> Vec<u8> {
    let mut inside = Vec::new();
    let mut rest = key;
    while let Some((before, after)) = rest.split_once('%') {
        inside.extend_from_slice(before.as_bytes());
        let digits = after
            .get(..2)
            .and_then(|two| u8::from_str_radix(two, 16).ok());
        inside.push(digits.unwrap_or(b'%'));
        rest = digits.map_or(after, |_| &after[2..]);
    }
    inside.extend_from_slice(rest.as_bytes());
    inside
}

/// The path of a file in the folder `root`.
pub(super) fn path_of(root: &Path, inside: &[u8]) -> PathBuf {
    root.join(OsStr::from_bytes(inside))
}

/// A path as bytes, without `.` components.
pub(super) fn bytes_of(path: &Path) -> Vec<u8> {
    let plain: PathBuf = path.components().collect();
    let plain = plain.strip_prefix(".").unwrap_or(&plain);
    plain.as_os_str().as_bytes().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::split_name;

    #[test]
    fn key_ends_before_the_longest_known_extension() {
        let keys = MemberKeys {
            images: vec!["jpg".to_owned(), "seg.png".to_owned()],
            captions: vec!["txt".to_owned()],
        };
        let split = |path: &str| {
            keys.split(path.as_bytes())
                .map(|(end, kind)| (path[..end].to_owned(), kind))
        };
        let some = |key: &str, kind| Some((key.to_owned(), kind));
        assert_eq!(split("a.b.jpg"), some("a.b", MemberKind::Image));
        assert_eq!(split("d.x/a.JPG"), some("d.x/a", MemberKind::Image));
        assert_eq!(split("a.seg.png"), some("a", MemberKind::Image));
        assert_eq!(split("a.v.png"), some("a.v", MemberKind::Image));
        assert_eq!(split("a.Txt"), some("a", MemberKind::Caption));
        assert_eq!(split("a.json"), some("a", MemberKind::Json));
        for other in ["a", "d/.jpg", ".jpg", "a.pdf", "Thumbs.db", "ajpg", ""] {
            assert_eq!(split(other), None, "{other}");
        }
    }

    #[test]
    fn encoded_keys_are_found_again_and_differ() {
        let keys: [&[u8]; 9] = [
            b"a",
            b"a.b",
            b"a%2Eb",
            b"d.e/a",
            b"__a__/b",
            b"a b",
            "\u{e9}/\u{540d}".as_bytes(),
            b"a\nb",
            b"\xff\xfe",
        ];
        let encoded: Vec<String> = keys.iter().map(|key| encoded(key)).collect();
        assert_eq!(
            encoded,
            [
                "a",
                "a%2Eb",
                "a%252Eb",
                "d.e/a",
                "%5F_a__/b",
                "a b",
                "\u{e9}/\u{540d}",
                "a%0Ab",
                "%FF%FE"
            ]
        );
        for (key, encoded) in keys.iter().zip(&encoded) {
            let file = [key, b".txt".as_slice()].concat();
            assert_eq!(
                file_of(Path::new(""), encoded, "txt"),
                path_of(Path::new(""), &file)
            );
        }
        for key in &encoded {
            let member = format!("{key}.seg.png");
            let (found, extension) = split_name(member.as_bytes()).unwrap();
            assert_eq!((found, extension.as_str()), (key.as_bytes(), "seg.png"));
        }
    }
}
