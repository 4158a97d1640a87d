//! The page at `/`: one file, which loads nothing from other hosts.

use base64::prelude::{BASE64_STANDARD, Engine};
use sha2::{Digest, Sha256};

/// Markup, style and script.
pub(super) const HTML: &str = include_str!("page.html");

/// The `Content-Security-Policy` of the page: only the script in the file runs, and only this server is contacted.
pub(super) fn policy() -> String {
    format!(
        "default-src 'none'; script-src {}; style-src {}; img-src 'self' data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(inside("<script>", "</script>")),
        hash(inside("<style>", "</style>")),
    )
}

/// The text of the page between two tags.
fn inside(begin: &str, end: &str) -> &'static str {
    let (_, rest) = HTML.split_once(begin).unwrap_or_default();
    rest.split_once(end).unwrap_or_default().0
}

fn hash(text: &str) -> String {
    format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_one_file_without_foreign_content() {
        for begin in ["<script", "<style"] {
            assert_eq!(HTML.matches(begin).count(), 1, "{begin}");
        }
        assert!(inside("<script>", "</script>").contains("new EventSource(\"events\")"));
        assert!(inside("<style>", "</style>").contains("prefers-color-scheme"));
        // Other hosts, and functions that would turn a caption into markup.
        for never in [
            "http:",
            "https:",
            "//cdn",
            "@import",
            "url(",
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            " style=\"",
            " onclick",
        ] {
            assert!(!HTML.contains(never), "{never}");
        }
    }

    #[test]
    fn page_policy_names_its_script_and_style() {
        let policy = policy();
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"));
        // The hash of the empty text: a tag was not found.
        assert!(!policy.contains("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="));
    }
}
