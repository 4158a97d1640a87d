//! How a model is named: a folder, a prefix in S3 or an id on the Hub.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use coffey_pipeline::text::{escaped, redact_urls};
use serde::{Deserialize, Serialize};

/// A model's name as it was written. [`ModelRef::place`] decides what it stands for: a folder that exists takes precedence
/// over a Hub id of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelRef(String);

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPlace {
    /// A folder that exists.
    Folder(PathBuf),
    /// A file that exists, which is no model.
    File(PathBuf),
    /// Everything under this prefix, `s3://bucket/…/`, ending in `/`.
    S3(String),
    /// A repository of the Hub, `user/model`.
    Hub(String),
}

/// Why a name is not a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelRefError {
    /// Not a folder that exists, an S3 prefix or a Hub id.
    #[error(
        "no such folder; a model is a folder in diffusers layout, s3://bucket/prefix or a Hub id as user/model{}",
        if *home { "; \"~\" is not expanded, write the path in full" } else { "" }
    )]
    NoFolder {
        /// Whether the name starts with `~`.
        home: bool,
    },
    /// An S3 URL without a bucket.
    #[error("has no bucket; the form is s3://bucket/prefix")]
    NoBucket,
    /// Another kind of URL.
    #[error(
        "{scheme}:// is not read; write a model of the Hub as user/model, one in S3 as s3://bucket/prefix"
    )]
    Scheme {
        /// The URL's scheme.
        scheme: String,
    },
}

impl ModelRef {
    /// The name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the model is. Asks no server: a Hub id need not exist.
    ///
    /// # Errors
    /// [`ModelRefError`] when the name is none of the three.
    pub fn place(&self) -> Result<ModelPlace, ModelRefError> {
        let text = self.0.as_str();
        if let Some(rest) = text.strip_prefix("s3://") {
            let prefix = rest.trim_end_matches('/');
            if prefix.is_empty() || prefix.starts_with('/') {
                return Err(ModelRefError::NoBucket);
            }
            return Ok(ModelPlace::S3(format!("s3://{prefix}/")));
        }
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(ModelPlace::Folder(path.to_owned()));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return Err(ModelRefError::Scheme {
                scheme: scheme.to_owned(),
            });
        }
        if path.is_file() {
            return Ok(ModelPlace::File(path.to_owned()));
        }
        if is_hub_id(text) {
            return Ok(ModelPlace::Hub(text.to_owned()));
        }
        Err(ModelRefError::NoFolder {
            home: text.starts_with('~'),
        })
    }
}

/// Whether `text` has the form of a Hub id, `name/name`.
pub(super) fn is_hub_id(text: &str) -> bool {
    let name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.split_once('/')
        .is_some_and(|(user, model)| name(user) && name(model))
}

impl From<String> for ModelRef {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl FromStr for ModelRef {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

/// Text for people: without secrets and control characters.
impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escaped(&redact_urls(&self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Result<ModelPlace, ModelRefError> {
        ModelRef::from(text.to_owned()).place()
    }

    #[test]
    fn model_ref_is_a_folder_a_prefix_or_a_hub_id() {
        // Unit tests run in the repository's root, where src/models is a folder that looks like a Hub id.
        for folder in ["src", "src/models", "./src", "."] {
            assert_eq!(place(folder), Ok(ModelPlace::Folder(folder.into())));
        }
        for (text, prefix) in [
            ("s3://bucket", "s3://bucket/"),
            ("s3://bucket/", "s3://bucket/"),
            ("s3://bucket/a/b", "s3://bucket/a/b/"),
            ("s3://bucket/a/b//", "s3://bucket/a/b/"),
        ] {
            assert_eq!(place(text), Ok(ModelPlace::S3(prefix.to_owned())));
        }
        for id in [
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "SimianLuo/LCM_Dreamshaper_v7",
            "src/no-such-folder",
        ] {
            assert_eq!(place(id), Ok(ModelPlace::Hub(id.to_owned())));
        }
    }

    #[test]
    fn model_ref_error_says_what_would_be_right() {
        for text in [
            "nowhere",
            "/no/such",
            "./no/such",
            "../no-such",
            "a/b/c",
            "a/",
            "/a",
            "a b/c",
            "ü/x",
        ] {
            let error = place(text).unwrap_err();
            assert_eq!(error, ModelRefError::NoFolder { home: false }, "{text}");
            let said = error.to_string();
            assert!(
                said.starts_with("no such folder;") && said.contains("user/model"),
                "{said}"
            );
        }
        let said = place("~/model").unwrap_err().to_string();
        assert!(said.contains("not expanded"), "{said}");
        assert_eq!(
            place("Cargo.toml"),
            Ok(ModelPlace::File("Cargo.toml".into()))
        );
        assert_eq!(place("s3://"), Err(ModelRefError::NoBucket));
        assert_eq!(place("s3:///a"), Err(ModelRefError::NoBucket));
        let said = place("https://huggingface.co/a/b").unwrap_err().to_string();
        assert!(said.starts_with("https:// is not read"), "{said}");
    }
}
