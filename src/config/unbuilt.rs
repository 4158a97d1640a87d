//! The keys and values whose feature this version does not have. Writing one down is refused, never ignored.
//! When a feature is built its rows go, and what they name becomes a field or a variant like any other.

use toml::Value;

use super::document::Document;
use super::error::ConfigError;

/// One row: which words are refused as the value of a key, and what to write instead.
#[derive(Debug)]
pub(super) struct Unbuilt {
    pub(super) key: &'static str,
    pub(super) words: &'static [&'static str],
    pub(super) instead: &'static str,
}

/// Every key and value of the design that is not built yet.
#[rustfmt::skip]
pub(super) const UNBUILT: &[Unbuilt] = &[
    row("encode.dtype", &["f16", "bf16"], r#"use "f32""#),
    row("encode.vae_dtype", &["f16", "bf16"], r#"use "f32""#),
];

const fn row(key: &'static str, words: &'static [&'static str], instead: &'static str) -> Unbuilt {
    Unbuilt {
        key,
        words,
        instead,
    }
}

/// Refuses the first value of the document that is not built.
pub(super) fn refuse(document: &Document) -> Result<(), ConfigError> {
    for row in UNBUILT {
        if let Some(value) = document.get(row.key)
            && let Value::String(word) = value
            && row.words.contains(&word.as_str())
        {
            return Err(ConfigError::NotBuilt {
                entry: document.origin.entry(row.key, value),
                instead: row.instead,
            });
        }
    }
    Ok(())
}
