//! Prompts to draw from a text file, one a line.

use std::path::Path;

use coffey_pipeline::bounded;

/// Size above which a file is refused. Bytes.
const MAX_BYTES: u64 = 1_000_000;
/// Number of prompts above which a file is refused: each is an image of one picture.
const MAX_PROMPTS: usize = 1000;

/// Why a file gives no prompts; the caller names the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PromptFileError {
    /// The file can't be read.
    #[error("can't be read: {0}")]
    Read(#[from] std::io::Error),
    /// A line is not text.
    #[error("line {line} is not UTF-8 text; save the file as UTF-8, with one prompt a line")]
    NotText {
        /// The line, from 1.
        line: usize,
    },
    /// Every line is empty.
    #[error("has no prompt; write one a line")]
    Empty,
    /// More prompts than one picture can show.
    #[error("has more than {MAX_PROMPTS} prompts (line {line} is one more); divide the file")]
    TooMany {
        /// The line of the first prompt too many, from 1.
        line: usize,
    },
}

/// Reads the prompts of a file in UTF-8, at least one. Spaces around a prompt and empty lines are left out; no character is special.
pub(crate) fn read(path: &Path) -> Result<Vec<String>, PromptFileError> {
    parse(&bounded::read_file(path, MAX_BYTES)?)
}

fn parse(bytes: &[u8]) -> Result<Vec<String>, PromptFileError> {
    // Editors on Windows begin a file with a byte order mark.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut prompts = Vec::new();
    for (line, bytes) in (1..).zip(bytes.split_inclusive(|&byte| byte == b'\n')) {
        let prompt = match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => text.trim(),
            _ => return Err(PromptFileError::NotText { line }),
        };
        if prompt.is_empty() {
            continue;
        }
        if prompts.len() == MAX_PROMPTS {
            return Err(PromptFileError::TooMany { line });
        }
        prompts.push(prompt.to_owned());
    }
    if prompts.is_empty() {
        return Err(PromptFileError::Empty);
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_file_has_a_prompt_a_line() {
        let text = "\u{feff}red apple\r\n\n  # 1 cat, \"face\" \n\t\nkäse\u{a0}";
        assert_eq!(
            parse(text.as_bytes()).unwrap(),
            ["red apple", "# 1 cat, \"face\"", "käse"]
        );
    }

    #[test]
    fn prompt_file_errors_name_the_line() {
        let refused = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert!(refused(b"a\n\nb \xff\n").starts_with("line 3 is not UTF-8"));
        // UTF-16.
        assert!(refused(b"a\0b\0\n\0").starts_with("line 1 is not UTF-8"));
        for empty in [&b""[..], b"\n \n"] {
            assert_eq!(refused(empty), "has no prompt; write one a line");
        }
        let many = "a\n".repeat(MAX_PROMPTS);
        assert_eq!(parse(many.as_bytes()).unwrap().len(), MAX_PROMPTS);
        assert!(refused(format!("{many}\na").as_bytes()).contains("line 1002"));
    }

    #[test]
    fn prompt_file_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        std::fs::write(&path, vec![b'a'; MAX_BYTES as usize + 1]).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("at most"));
        let message = read(folder.path()).unwrap_err().to_string();
        assert!(message.starts_with("can't be read: "), "{message}");
        let device = read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(device.ends_with("it is a device, not a file"), "{device}");
    }
}
