//! `hf://` URLs: files in repositories of the Hugging Face Hub. Purely text.

use std::fmt;

/// Revision of a URL that names none.
const MAIN: &str = "main";
const FORM: &str = "the form is hf://datasets/USER/NAME/path/00000.tar, with a revision hf://datasets/USER/NAME@REVISION/path/00000.tar";

/// A file of a repository, or a folder if its path is empty or ends in `/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HubFile {
    /// `datasets/USER/NAME`, `spaces/USER/NAME`, or `USER/NAME` for a model.
    pub(crate) repository: String,
    /// Branch, tag or commit; `None` for `main`.
    pub(crate) revision: Option<String>,
    pub(crate) path: String,
}

impl HubFile {
    /// Parses the part after `hf://`.
    ///
    /// # Errors
    /// The fault, and the right form.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (kind, rest) = match text.split_once('/') {
            Some((kind @ ("datasets" | "spaces"), rest)) => (format!("{kind}/"), rest),
            Some(("models", rest)) => (String::new(), rest),
            Some(("buckets", _)) => return Err(format!("names a bucket of the Hub; {FORM}")),
            _ => (String::new(), text),
        };
        let Some((user, rest)) = rest.split_once('/') else {
            return Err(format!("has no repository; {FORM}"));
        };
        let Some((name, rest)) = rest.split_once('/') else {
            return Err(format!(
                "names a repository but no file; {FORM}; a '/' at its end takes every .tar in it"
            ));
        };
        let (name, revision, path) = match name.split_once('@') {
            None => (name, None, rest),
            Some((name, start)) => {
                let (revision, path) = revision(start, rest);
                if revision.is_empty() {
                    return Err(format!("has an empty revision; {FORM}"));
                }
                (name, Some(revision), path)
            }
        };
        let is_word = |word: &str| {
            !word.is_empty()
                && word
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && word != ".."
                && word != "."
        };
        let is_kind = ["datasets", "spaces", "models", "buckets"].contains(&user);
        if is_kind || !is_word(user) || !is_word(name) {
            return Err(format!("has no valid repository; {FORM}"));
        }
        Ok(Self {
            repository: format!("{kind}{user}/{name}"),
            revision,
            path: path.to_owned(),
        })
    }

    fn encoded_revision(&self) -> String {
        encode(self.revision.as_deref().unwrap_or(MAIN)).replace('/', "%2F")
    }

    /// The address of the file on the Hub at `endpoint`.
    pub(crate) fn resolve(&self, endpoint: &str) -> String {
        format!(
            "{endpoint}/{}/resolve/{}/{}",
            self.repository,
            self.encoded_revision(),
            encode(&self.path)
        )
    }

    /// The address of the listing of this folder on the Hub at `endpoint`.
    pub(crate) fn tree(&self, endpoint: &str, recursive: bool) -> String {
        let kind = match self.repository.matches('/').count() {
            1 => "models/",
            _ => "",
        };
        let folder = match self.path.trim_end_matches('/') {
            "" => String::new(),
            path => format!("/{}", encode(path)),
        };
        format!(
            "{endpoint}/api/{kind}{}/tree/{}{folder}?recursive={recursive}",
            self.repository,
            self.encoded_revision()
        )
    }
}

/// The revision after `@`, and the path. Only the names of pull requests and conversions contain a `/`.
fn revision<'a>(start: &str, rest: &'a str) -> (String, &'a str) {
    if start == "refs"
        && let Some((kind @ ("pr" | "convert"), rest)) = rest.split_once('/')
        && let Some((name, path)) = rest.split_once('/')
    {
        return (format!("refs/{kind}/{name}"), path);
    }
    (start.replace("%2F", "/").replace("%2f", "/"), rest)
}

/// `text` as a path in a URL; what else needs an escape gets it when the URL is parsed.
fn encode(text: &str) -> String {
    text.replace('%', "%25")
        .replace('?', "%3F")
        .replace('#', "%23")
        .replace('\\', "%5C")
}

impl fmt::Display for HubFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf://{}", self.repository)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{}", revision.replace('/', "%2F"))?;
        }
        write!(f, "/{}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_url_is_resolved_and_repeated() {
        for (text, address) in [
            (
                "datasets/u/n/a/0.tar",
                "h/datasets/u/n/resolve/main/a/0.tar",
            ),
            ("datasets/u/n@v1/0.tar", "h/datasets/u/n/resolve/v1/0.tar"),
            (
                "datasets/u/n@refs/pr/3/0.tar",
                "h/datasets/u/n/resolve/refs%2Fpr%2F3/0.tar",
            ),
            (
                "datasets/u/n@a%2Fb/0.tar",
                "h/datasets/u/n/resolve/a%2Fb/0.tar",
            ),
            ("u/n/a?b#c%.tar", "h/u/n/resolve/main/a%3Fb%23c%25.tar"),
        ] {
            let file = HubFile::parse(text).unwrap();
            assert_eq!(file.resolve("h"), address);
            assert_eq!(
                HubFile::parse(file.to_string().trim_start_matches("hf://")),
                Ok(file)
            );
        }
        let model = HubFile::parse("models/u/n/0.tar").unwrap();
        assert_eq!(model.to_string(), "hf://u/n/0.tar");
        let tree = |text: &str| HubFile::parse(text).unwrap().tree("h", true);
        assert_eq!(tree("u/n/"), "h/api/models/u/n/tree/main?recursive=true");
        assert_eq!(
            tree("datasets/u/n@v/a/b/"),
            "h/api/datasets/u/n/tree/v/a/b?recursive=true"
        );
    }

    #[test]
    fn hub_url_errors_say_the_form() {
        for text in [
            "datasets/u",
            "datasets/u/n",
            "u",
            "",
            "datasets/u/n@/0.tar",
            "datasets//n/0.tar",
            "buckets/u/n/0.tar",
            "models/datasets/n/0.tar",
            "datasets/../n/0.tar",
        ] {
            let error = HubFile::parse(text).unwrap_err();
            assert!(
                error.contains("hf://datasets/USER/NAME/"),
                "{text}: {error}"
            );
        }
    }
}
