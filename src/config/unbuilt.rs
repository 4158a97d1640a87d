//! The keys and values whose feature this version does not have. Writing one down is refused, never ignored.
//! When a feature is built its rows go, and what they name becomes a field or a variant like any other.

use toml::Value;

use super::document::Document;
use super::error::ConfigError;

/// One row: which values of a key are refused, and what to write instead.
#[derive(Debug)]
pub(super) struct Unbuilt {
    pub(super) key: &'static str,
    pub(super) refused: Refused,
    pub(super) instead: &'static str,
}

/// The values that are refused.
#[derive(Debug)]
pub(super) enum Refused {
    /// These words.
    Words(&'static [&'static str]),
}

use Refused::Words;

/// Every key and value of the design that is not built yet.
#[rustfmt::skip]
pub(super) const UNBUILT: &[Unbuilt] = &[
    row("encode.dtype", Words(&["f16", "bf16"]), r#"use "f32""#),
    row("encode.vae_dtype", Words(&["f16", "bf16"]), r#"use "f32""#),
];

const fn row(key: &'static str, refused: Refused, instead: &'static str) -> Unbuilt {
    Unbuilt {
        key,
        refused,
        instead,
    }
}

impl Refused {
    fn covers(&self, value: &Value) -> bool {
        match (self, value) {
            (Words(words), Value::String(text)) => words.contains(&text.as_str()),
            _ => false,
        }
    }
}

/// Refuses the first value of the document that is not built.
pub(super) fn refuse(document: &Document) -> Result<(), ConfigError> {
    for row in UNBUILT {
        if let Some(value) = document.get(row.key)
            && row.refused.covers(value)
        {
            return Err(ConfigError::NotBuilt {
                entry: document.origin.entry(row.key, value),
                instead: row.instead,
            });
        }
    }
    Ok(())
}
