//! The kind of a file that is not a tar, by its first bytes.

/// A kind of file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OtherFile {
    /// With its article: `an HTML page`.
    pub(super) name: String,
    /// The remedy; begins with `; ` or is empty.
    pub(super) advice: &'static str,
}

const COMPRESSED: &str = "; shards are read as plain tars or in gzip";
const PACKED: &str = "; shards are tars, plain or in gzip";

const MAGIC: &[(&[u8], &str, &str)] = &[
    (
        b"version https://git-lfs.github.com/spec/",
        "a git-lfs pointer",
        "; run `git lfs pull` in its repository",
    ),
    (b"BZh", "in bzip2", COMPRESSED),
    (b"\xFD7zXZ\0", "in xz", COMPRESSED),
    (b"\x28\xB5\x2F\xFD", "in zstd", COMPRESSED),
    (b"\x04\x22\x4D\x18", "in lz4", COMPRESSED),
    (b"LZIP", "in lzip", COMPRESSED),
    (b"\x5D\0\0", "in lzma", COMPRESSED),
    (b"\x1F\x9D", "in compress", COMPRESSED),
    (b"PK\x03\x04", "a zip archive", PACKED),
    (b"PK\x05\x06", "an empty zip archive", PACKED),
    (b"7z\xBC\xAF\x27\x1C", "a 7z archive", PACKED),
    (b"Rar!\x1A\x07", "a rar archive", PACKED),
    (
        b"PAR1",
        "a parquet file",
        "; the tars of a data set lie beside it, or have to be made of it",
    ),
    (b"ARROW1", "an arrow file", PACKED),
    (b"\x89HDF\r\n\x1A\n", "an HDF5 file", PACKED),
    (b"\x93NUMPY", "a numpy array", PACKED),
    (b"SQLite format 3\0", "an SQLite database", PACKED),
    (b"\xFF\xD8\xFF", "a JPEG image", PACKED),
    (b"\x89PNG\r\n\x1A\n", "a PNG image", PACKED),
    (b"%PDF-", "a PDF", PACKED),
];

/// The kind of a file that begins with `start`; `None` if it is not known.
pub(super) fn describe(start: &[u8]) -> Option<OtherFile> {
    let file = |name: String, advice| Some(OtherFile { name, advice });
    if let Some((_, name, advice)) = MAGIC.iter().find(|(magic, ..)| start.starts_with(magic)) {
        return file((*name).to_owned(), advice);
    }
    // A frame that zstd skips, with any of 16 marks.
    if let [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] = start {
        return file("in zstd".to_owned(), COMPRESSED);
    }
    let text = text(start)?;
    let beginning = text.trim_start_matches('\u{feff}').trim_start();
    let lower = beginning.to_ascii_lowercase();
    let is_html = ["<!doctype html", "<html", "<head", "<body"]
        .iter()
        .any(|tag| lower.starts_with(tag))
        || lower.starts_with('<') && lower.contains("<html");
    let quote = quoted(beginning);
    match beginning.chars().next() {
        None => None,
        _ if is_html => file(
            "an HTML page, such as a login page or an error page".to_owned(),
            "",
        ),
        Some('<') => file(format!("XML ({quote})"), ""),
        Some('{' | '[') => file(format!("JSON ({quote})"), ""),
        Some(_) => file(format!("text ({quote})"), ""),
    }
}

/// The text of a file that is text; it may end inside a character.
fn text(start: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&start[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let is_binary = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\u{1b}');
    (!text.contains(is_binary)).then_some(text)
}

/// The beginning of a text as one line.
fn quoted(text: &str) -> String {
    /// Most characters that are quoted.
    const QUOTED: usize = 200;
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let line = words.join(" ");
    match line.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_are_named() {
        for (start, words) in [
            (
                b"version https://git-lfs.github.com/spec/v1\noid".as_slice(),
                "a git-lfs pointer; run `git lfs pull`",
            ),
            (
                b"\x28\xB5\x2F\xFD\0",
                "in zstd; shards are read as plain tars or in gzip",
            ),
            (b"\x50\x2A\x4D\x18\0", "in zstd;"),
            (b"PAR1\x15\0", "a parquet file;"),
            (b"PK\x03\x04", "a zip archive; shards are tars"),
            (b"\n <!DOCTYPE HTML><html>", "an HTML page, such as"),
            (
                b"<?xml version=\"1.0\"?>\n<!DOCTYPE html PUBLIC><html>",
                "an HTML page, such as",
            ),
            (
                b"<?xml version=\"1.0\"?>\n<Error><Code>AccessDenied</Code></Error>",
                "XML (<?xml version=\"1.0\"?> <Error><Code>AccessDenied",
            ),
            (
                b"\xEF\xBB\xBF{\"error\":\n \"gone\"}",
                "JSON ({\"error\": \"gone\"})",
            ),
            (b"Invalid credentials\n", "text (Invalid credentials)"),
            (
                "caf\u{e9} \u{e9}".as_bytes().split_last().unwrap().1,
                "text (caf\u{e9})",
            ),
        ] {
            let what = describe(start).unwrap();
            let said = what.name + what.advice;
            assert!(said.starts_with(words), "{said}");
        }
        for unknown in [
            b"\x07\x07".as_slice(),
            b"",
            b" \n",
            b"a\0b",
            b"\xFF\xFE\xFD",
        ] {
            assert_eq!(describe(unknown), None, "{unknown:?}");
        }
        let long = describe("word ".repeat(100).as_bytes()).unwrap().name;
        assert!(long.chars().count() < 220, "{long}");
    }
}
