//! From the text of a configuration and its `-s` overrides to structs.
//!
//! Three passes: `document` merges text and overrides into one table that knows where each key was written; `keys` refuses unknown
//! keys; `decode` turns the table into structs. Before it `bounds` checks the numbers, and after it `limits` the other values, outside
//! this module.

mod decode;
mod document;
mod keys;

use toml::Value;

use super::{Config, ConfigError, bounds};
use document::Document;

pub(super) use document::{Origin, flatten, join};
#[cfg(test)]
pub(super) use keys::known_keys;

/// Parses `text`, which messages call `file_name`, with `overrides`, each `key=value`, laid over it in order.
pub(super) fn parse(
    text: &str,
    file_name: &str,
    overrides: &[String],
) -> Result<Config, ConfigError> {
    let document = Document::parse(text, file_name, overrides)?;
    keys::refuse_unknown(&document)?;
    let Document { root, mut origin } = document;
    origin.note(&root);
    bounds::check(&root, &origin)?;
    let mut config: Config = decode::decode(&Value::Table(root), &origin)?;
    config.origin = origin;
    Ok(config)
}
