//! The page at `/`: one file, whole, that asks no other host for anything.

use base64::prelude::{BASE64_STANDARD, Engine};
use sha2::{Digest, Sha256};

/// Markup, style and script.
pub(super) const HTML: &str = include_str!("page.html");

/// The `Content-Security-Policy` of the page: nothing runs but the script in the file, and nothing is loaded but from here.
pub(super) fn policy() -> String {
    format!(
        "default-src 'none'; script-src {}; style-src {}; img-src 'self' data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(inside("<script>", "</script>")),
        hash(inside("<style>", "</style>")),
    )
}

/// What the page has between two tags.
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
    fn the_page_is_whole_and_holds_nothing_a_stranger_could_fill() {
        for begin in ["<script", "<style"] {
            assert_eq!(HTML.matches(begin).count(), 1, "{begin}");
        }
        assert!(inside("<script>", "</script>").contains("new EventSource(\"events\")"));
        assert!(inside("<style>", "</style>").contains("prefers-color-scheme"));
        // Other hosts, and what would turn a caption into markup.
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
    fn the_policy_names_what_is_in_the_file() {
        let policy = policy();
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"));
        // Of the empty text: a tag was not found.
        assert!(!policy.contains("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="));
    }
}
