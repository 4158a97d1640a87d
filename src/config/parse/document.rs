//! The text of a configuration and its `-s` overrides as one TOML table that remembers where each key was written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::Range;

use coffey_pipeline::text::{cut, escaped, redact_urls};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::keys::is_known;
use crate::config::bounds;
use crate::config::error::{ConfigError, KeyValue, WrittenAt};

/// Where each key was written. All origins are equal, so that configurations compare by their values alone.
#[derive(Debug, Clone, Default)]
pub(in crate::config) struct Origin {
    file: String,
    lines: BTreeMap<String, usize>,
    arguments: BTreeMap<String, String>,
    /// Keys that have a value in the file or in an override.
    written: BTreeSet<String>,
}

impl PartialEq for Origin {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Origin {
    /// Records the keys that have a value, after the overrides are applied.
    pub(super) fn note(&mut self, root: &Table) {
        let mut keys = Vec::new();
        flatten("", root, &mut keys);
        self.written = keys.into_iter().map(|(key, _)| key).collect();
    }

    /// Whether `key` was written down, not filled in with its default.
    pub(in crate::config) fn has(&self, key: &str) -> bool {
        self.written.contains(key)
    }

    /// Where `key` was written; the file without a line when it was not. An item of a list (`encode.devices[1]`) has the
    /// place of its list; a key inside an overridden table has the place of the override.
    pub(in crate::config) fn place(&self, key: &str) -> WrittenAt {
        let key = key.split('[').next().unwrap_or(key);
        let mut prefix = key;
        loop {
            if let Some(argument) = self.arguments.get(prefix) {
                return WrittenAt::Argument(argument.clone());
            }
            match prefix.rfind('.') {
                Some(dot) => prefix = &prefix[..dot],
                None => break,
            }
        }
        let line = self.lines.get(key).copied();
        let inside = format!("{key}.");
        // A table that an override alone creates.
        let argument = self
            .arguments
            .iter()
            .find(|(known, _)| known.starts_with(&inside));
        match argument {
            Some((_, argument)) if line.is_none() => WrittenAt::Argument(argument.clone()),
            _ => WrittenAt::File {
                file: self.file.clone(),
                line,
            },
        }
    }

    /// `key` with its value, for an error.
    pub(in crate::config) fn entry(&self, key: &str, value: impl Display) -> Box<KeyValue> {
        Box::new(KeyValue {
            place: self.place(key),
            key: key.to_owned(),
            value: shown_value(key, &value.to_string()),
        })
    }

    /// The file as a whole.
    pub(in crate::config) fn file(&self) -> WrittenAt {
        WrittenAt::File {
            file: self.file.clone(),
            line: None,
        }
    }
}

/// The merged table and its origin.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) root: Table,
    pub(super) origin: Origin,
}

impl Document {
    /// Parses `text` and lays `overrides` over it, in order.
    pub(super) fn parse(text: &str, file: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let syntax = |error: toml::de::Error| {
            let (line, column) = position(text, error.span());
            ConfigError::Syntax {
                file: file.to_owned(),
                line,
                column,
                message: error.message().replace('\n', ", "),
            }
        };
        let mut lines = BTreeMap::new();
        let spanned = DeTable::parse(text).map_err(syntax)?;
        note_lines(text, "", spanned.get_ref(), &mut lines);

        let origin = Origin {
            file: file.to_owned(),
            lines,
            ..Origin::default()
        };
        refuse_beyond("", spanned.get_ref(), &origin)?;
        let mut document = Self {
            root: toml::from_str(text).map_err(syntax)?,
            origin,
        };
        for argument in overrides {
            document.set(argument)?;
        }
        Ok(document)
    }

    /// Applies one `key=value`.
    fn set(&mut self, argument: &str) -> Result<(), ConfigError> {
        let wrong = |message: String| ConfigError::Override {
            argument: shown(argument),
            message,
        };
        let (key, text) = argument
            .split_once('=')
            .ok_or_else(|| wrong("needs the form key=value, as train.max_steps=10".to_owned()))?;
        let (key, text) = (key.trim(), text.trim());
        let bare = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        };
        if !key.split('.').all(bare) {
            return Err(wrong(format!(
                "{:?} is not a key; write table.key=value, as train.max_steps=10",
                plain(key)
            )));
        }
        // This argument replaces earlier arguments for keys inside its table.
        let inside = format!("{key}.");
        let arguments = &mut self.origin.arguments;
        arguments.retain(|known, _| !known.starts_with(&inside));
        arguments.insert(key.to_owned(), shown(argument));
        if let Ok(value) = DeValue::parse(text) {
            refuse_beyond_at(key, value.get_ref(), &self.origin)?;
        }
        let value = override_value(text).map_err(wrong)?;

        let mut table = &mut self.root;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                table.insert(part.to_owned(), value);
                break;
            }
            let entry = table
                .entry(part)
                .or_insert_with(|| Value::Table(Table::new()));
            let Value::Table(inner) = entry else {
                return Err(wrong(format!(
                    "{part} is not a table, so nothing in it can be set"
                )));
            };
            table = inner;
        }
        Ok(())
    }
}

/// The text in place of a secret in messages.
pub(super) const HIDDEN: &str = "…";

/// Whether messages must not have the key's value: a secret that belongs elsewhere may be in it.
fn is_secret(key: &str) -> bool {
    key.split('[').next() == Some("data.http_headers")
}

/// A text for a message, without logins and signatures of URLs, and cut where it is long.
fn plain(text: &str) -> String {
    cut(&escaped(&redact_urls(text))).into_owned()
}

/// A value for a message, without secrets.
fn shown_value(key: &str, value: &str) -> String {
    // The options of a command may hold a login.
    match is_secret(key) || value.contains("pipe:") {
        true => HIDDEN.to_owned(),
        false => plain(value),
    }
}

/// Whether a message may have the value of an override: each key in it is known.
fn is_showable(key: &str, value: &str) -> bool {
    fn has_known_keys(key: &str, table: &DeTable<'_>) -> bool {
        table.iter().all(|(name, value)| {
            let key = join(key, name.get_ref());
            match value.get_ref() {
                DeValue::Table(inner) => has_known_keys(&key, inner),
                _ => is_known(&key) && !is_secret(&key),
            }
        })
    }
    match DeValue::parse(value).as_ref().map(|value| value.get_ref()) {
        Ok(DeValue::Table(table)) => has_known_keys(key, table),
        _ => is_known(key),
    }
}

/// An override for a message; without its value where a key is unknown, since a secret may be in it.
fn shown(argument: &str) -> String {
    match argument.split_once('=') {
        Some((key, value)) if is_showable(key.trim(), value.trim()) => {
            format!("{key}={}", shown_value(key.trim(), value))
        }
        Some((key, _)) => plain(key.trim()),
        None => plain(argument),
    }
}

/// The value of an override: TOML where it looks like TOML, else the text itself as a string.
fn override_value(text: &str) -> Result<Value, String> {
    if text.is_empty() {
        return Err("has no value; write \"\" for an empty string".to_owned());
    }
    match text.parse::<Value>() {
        Ok(value) => Ok(value),
        Err(error) if text.starts_with(['"', '\'', '[', '{']) => Err(format!(
            "the value is not valid TOML: {}",
            error.message().replace('\n', ", ")
        )),
        Err(_) => Ok(Value::String(text.to_owned())),
    }
}

/// Refuses the first number below `table` that is beyond those of TOML, whose parser names neither the key nor the bound.
fn refuse_beyond(prefix: &str, table: &DeTable<'_>, origin: &Origin) -> Result<(), ConfigError> {
    table.iter().try_for_each(|(key, value)| {
        refuse_beyond_at(&join(prefix, key.get_ref()), value.get_ref(), origin)
    })
}

/// As [`refuse_beyond`], for the value at `key`.
fn refuse_beyond_at(key: &str, value: &DeValue<'_>, origin: &Origin) -> Result<(), ConfigError> {
    let number = match value {
        DeValue::Table(inner) => return refuse_beyond(key, inner, origin),
        DeValue::Integer(number)
            if i64::from_str_radix(number.as_str(), number.radix()).is_err() =>
        {
            number.to_string()
        }
        DeValue::Float(number)
            if !number.as_str().ends_with("inf")
                && number.as_str().parse().is_ok_and(f64::is_infinite) =>
        {
            number.to_string()
        }
        _ => return Ok(()),
    };
    Err(ConfigError::Invalid {
        needs: bounds::beyond(key, number.starts_with('-')),
        entry: origin.entry(key, number),
    })
}

/// Records the line of every key below `table`.
fn note_lines(text: &str, prefix: &str, table: &DeTable<'_>, lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        lines.insert(path.clone(), position(text, Some(key.span())).0);
        if let DeValue::Table(inner) = value.get_ref() {
            note_lines(text, &path, inner, lines);
        }
    }
}

/// Line and column, from 1, of the start of a byte span.
fn position(text: &str, span: Option<Range<usize>>) -> (usize, usize) {
    let at = span.map_or(0, |span| span.start).min(text.len());
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .map_or(0, |row| row.chars().count())
        + 1;
    (line, column)
}

/// Appends every value of `table` that is not a table, with its key in full.
pub(in crate::config) fn flatten(prefix: &str, table: &Table, into: &mut Vec<(String, Value)>) {
    for (key, value) in table {
        let key = join(prefix, key);
        match value {
            Value::Table(inner) => flatten(&key, inner, into),
            value => into.push((key, value.clone())),
        }
    }
}

/// `prefix.key`, or `key` at the top.
pub(in crate::config) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() {
        key.to_owned()
    } else {
        format!("{prefix}.{key}")
    }
}
