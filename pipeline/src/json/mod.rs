//! JSON as Python's `json` reads and writes it.
//!
//! Owns the reading of samples' json and of the JSON files of model folders. Python reads more than the standard
//! allows, and writes it: `NaN`, `Infinity`, numbers beyond f64, lone surrogates, repeated keys, UTF-16, UTF-32 and byte
//! order marks. A [`Document`] keeps all of them; [`from_slice`] turns them into the types of serde.

mod encoding;
mod scan;

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;

use scan::{Style, scan};

/// Most levels of lists and objects. Python's own limit is slightly below 1000, depending on the caller.
const MAX_DEPTH: usize = 990;
/// Most levels of what is given to serde: the limit of `serde_json`.
const MAX_STRICT_DEPTH: usize = 127;

/// Why a text is not JSON, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}{place}")]
pub struct JsonError {
    message: String,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Line and column, from 1; columns count characters.
    At(usize, usize),
    /// The message names the place.
    Named,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(line, column) => write!(f, " at line {line} column {column}"),
            Self::Named => Ok(()),
        }
    }
}

impl JsonError {
    fn named(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            place: Place::Named,
        }
    }
}

/// A key and its value in the text of a [`Document`].
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    /// With its quotes.
    key: Range<usize>,
    value: Range<usize>,
}

/// A JSON document that Python's `json.loads` reads, as text: without spaces, and otherwise as it was written. The
/// digits of numbers, the escapes of strings and repeated keys are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    text: String,
    /// Of the outermost object. `None` if the document is not an object.
    members: Option<Vec<Member>>,
}

impl Document {
    /// Reads a document.
    ///
    /// # Errors
    /// Where `json.loads` raises an error, with the place.
    pub fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        let scanned = scan(&encoding::decode(bytes)?, Style::Verbatim)?;
        Ok(Self {
            members: scanned.text.starts_with('{').then_some(scanned.members),
            text: scanned.text,
        })
    }

    /// The document without spaces.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Keys and values of the outermost object, as they are in the text; keys with their quotes. `None` if the
    /// document is not an object.
    pub fn members(&self) -> Option<impl Iterator<Item = (&str, &str)>> {
        let members = self.members.as_ref()?;
        let pair = |member: &Member| {
            let Member { key, value } = member.clone();
            (&self.text[key], &self.text[value])
        };
        Some(members.iter().map(pair))
    }

    /// The value of a key of the outermost object, as [`from_slice`] reads it. Of a repeated key the last value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value> {
        let named = self.members()?.filter(|(name, _)| is_key(name, key));
        value_of(named.last()?.1).ok()
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a key as it is in a text is `key`.
pub(crate) fn is_key(quoted: &str, key: &str) -> bool {
    let inner = &quoted[1..quoted.len() - 1];
    if !inner.contains('\\') {
        return inner == key;
    }
    value_of(quoted).is_ok_and(|value| value == *key)
}

/// A json that [`Document::parse`] does not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The json as it is in the shard.
    pub bytes: Bytes,
    /// Why it can't be read.
    pub error: JsonError,
}

impl Unreadable {
    /// The bytes as a JSON string. A byte that is not UTF-8 becomes a lone surrogate, `U+DC80` to `U+DCFF`, so that Python's
    /// `encode("utf-8", "surrogateescape")` restores it.
    #[must_use]
    pub fn quoted(&self) -> String {
        let mut text = "\"".to_owned();
        for chunk in self.bytes.utf8_chunks() {
            let valid = Value::from(chunk.valid()).to_string();
            text.push_str(&valid[1..valid.len() - 1]);
            for byte in chunk.invalid() {
                text.push_str(&format!("\\udc{byte:02x}"));
            }
        }
        text.push('"');
        text
    }
}

/// The json of a sample.
pub type SampleJson = Result<Document, Unreadable>;

/// Reads the json of a sample.
pub(crate) fn read_sample_json(bytes: &Bytes) -> SampleJson {
    Document::parse(bytes).map_err(|error| Unreadable {
        bytes: bytes.clone(),
        error,
    })
}

/// Reads a JSON file into a type of serde. Of a repeated key the last value counts. What serde's [`Value`] can't hold is
/// given to `T` in another form: a number that is not finite in f64 as a string of its text (`"-Infinity"`), a
/// lone surrogate as `U+FFFD`.
///
/// # Errors
/// Where `json.loads` raises an error, and where `T` does not accept a value, with its key. More than 127 levels are
/// refused.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    let points = encoding::decode(bytes)?;
    let text = scan(&points, Style::Strict)?.text;
    let value = strict_value(&text)?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let cause = error.into_inner();
        JsonError::named(match path.as_str() {
            "." => cause.to_string(),
            key => format!("\"{key}\": {cause}"),
        })
    })
}

fn value_of(text: &str) -> Result<Value, JsonError> {
    let points: Vec<u32> = text.chars().map(u32::from).collect();
    strict_value(&scan(&points, Style::Strict)?.text)
}

fn strict_value(text: &str) -> Result<Value, JsonError> {
    serde_json::from_str(text).map_err(|error| JsonError::named(error.to_string()))
}

#[cfg(test)]
mod tests;
