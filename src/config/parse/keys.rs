//! The refusal of unknown keys. The known keys are the fields of the structs.

use std::fmt;

use coffey_pipeline::{Filter, ImageOptions, S3Options};
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::forward_to_deserialize_any;
use toml::{Table, Value};

use super::decode::type_name;
use super::document::{Document, HIDDEN, join};
use crate::config::{
    Audit, Checkpoint, ConfigError, Data, Distill, Encode, Hub, Latents, Lora, Metrics, Model,
    MpiConfig, Optimizer, Report, Track, Train, Validation,
};

/// A table and the keys in it that are not tables.
struct KnownTable {
    name: &'static str,
    keys: Vec<&'static str>,
}

/// Every table with its keys.
fn known_tables() -> Vec<KnownTable> {
    let tables = [
        ("data", fields::<Data>()),
        ("data.filter", fields::<Filter>()),
        ("s3", fields::<S3Options>()),
        ("image", fields::<ImageOptions>()),
        ("model", fields::<Model>()),
        ("encode", fields::<Encode>()),
        ("distill", fields::<Distill>()),
        ("lora", fields::<Lora>()),
        ("optimizer", fields::<Optimizer>()),
        ("train", fields::<Train>()),
        ("checkpoint", fields::<Checkpoint>()),
        ("validation", fields::<Validation>()),
        ("report", fields::<Report>()),
        ("track", fields::<Track>()),
        ("metrics", fields::<Metrics>()),
        ("mpi", fields::<MpiConfig>()),
        ("hub", fields::<Hub>()),
        ("latents", fields::<Latents>()),
        ("audit", fields::<Audit>()),
    ];
    let names = tables.map(|(name, _)| name);
    let is_table = |table, key| names.contains(&join(table, key).as_str());
    tables
        .into_iter()
        .map(|(name, fields)| {
            let keys = fields.iter().copied().filter(|key| !is_table(name, key));
            KnownTable {
                name,
                keys: keys.collect(),
            }
        })
        .collect()
}

/// Every key in full.
#[cfg(test)]
pub(in crate::config) fn known_keys() -> Vec<String> {
    known_tables()
        .iter()
        .flat_map(|table| table.keys.iter().map(|key| join(table.name, key)))
        .collect()
}

/// Whether `key` is a known key in full, and not a table.
pub(super) fn is_known(key: &str) -> bool {
    key.rsplit_once('.').is_some_and(|(table, name)| {
        known_tables()
            .iter()
            .any(|known| known.name == table && known.keys.contains(&name))
    })
}

/// Refuses the first key of the document that is unknown.
pub(super) fn refuse_unknown(document: &Document) -> Result<(), ConfigError> {
    check_keys(document, &known_tables(), "", &document.root)
}

/// Checks the keys of `table`, whose own key is `prefix`.
fn check_keys(
    document: &Document,
    tables: &[KnownTable],
    prefix: &str,
    table: &Table,
) -> Result<(), ConfigError> {
    for (key, value) in table {
        let path = join(prefix, key);
        if tables.iter().any(|known| known.name == path) {
            let Value::Table(inner) = value else {
                return Err(ConfigError::WrongType {
                    // A secret may stand here by mistake.
                    entry: document.origin.entry(&path, HIDDEN),
                    found: type_name(value),
                    needs: format!("a table, as [{path}]"),
                });
            };
            check_keys(document, tables, &path, inner)?;
        } else if !tables
            .iter()
            .any(|known| known.name == prefix && known.keys.contains(&key.as_str()))
        {
            return Err(ConfigError::UnknownKey {
                place: document.origin.place(&path),
                hint: hint(tables, prefix, key, value.is_table()),
                key: path,
            });
        }
    }
    Ok(())
}

/// The nearest known key: the same name in another table, else a similar name in the same table, else a similar name in
/// any table, else the list of the table's keys.
fn hint(tables: &[KnownTable], prefix: &str, key: &str, is_table: bool) -> String {
    /// Jaro-Winkler similarity from which one name counts as a misspelling of another.
    const NEAR: f64 = 0.85;
    let all: Vec<(&str, &str)> = tables
        .iter()
        .flat_map(|table| table.keys.iter().map(|known| (table.name, *known)))
        .collect();
    let similarity = |a: &str, b: &str| strsim::jaro_winkler(a, b);

    if is_table {
        let path = join(prefix, key);
        let nearest = tables
            .iter()
            .max_by(|a, b| similarity(a.name, &path).total_cmp(&similarity(b.name, &path)));
        return match nearest {
            Some(table) if similarity(table.name, &path) >= NEAR => {
                format!("did you mean [{}]?", table.name)
            }
            _ => {
                let names: Vec<_> = tables.iter().map(|table| table.name).collect();
                format!("the tables are {}", names.join(", "))
            }
        };
    }
    let near = |candidates: &[(&str, &str)]| {
        candidates
            .iter()
            .max_by(|a, b| similarity(a.1, key).total_cmp(&similarity(b.1, key)))
            .filter(|nearest| similarity(nearest.1, key) >= NEAR)
            .map(|(table, known)| format!("did you mean {table}.{known}?"))
    };
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(table, _)| *table == prefix);
    let same_name: Vec<_> = elsewhere
        .iter()
        .copied()
        .filter(|(_, known)| *known == key)
        .collect();
    near(&same_name)
        .or_else(|| near(&here))
        .or_else(|| near(&elsewhere))
        .unwrap_or_else(|| {
            let known: Vec<_> = here.iter().map(|(_, known)| *known).collect();
            if known.is_empty() {
                let names: Vec<_> = tables.iter().map(|table| table.name).collect();
                format!("it belongs in a table, one of {}", names.join(", "))
            } else {
                format!("[{prefix}] knows {}", known.join(", "))
            }
        })
}

/// The field names of a struct, as its `Deserialize` asks for them.
fn fields<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    match T::deserialize(FieldProbe) {
        Err(Fields(names)) => names,
        Ok(_) => &[],
    }
}

/// A deserializer that fails with the field names it is asked for.
struct FieldProbe;

/// The field names, carried out of `deserialize` as its error.
#[derive(Debug)]
struct Fields(&'static [&'static str]);

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl std::error::Error for Fields {}

impl Error for Fields {
    fn custom<T: fmt::Display>(_: T) -> Self {
        Self(&[])
    }
}

impl<'de> Deserializer<'de> for FieldProbe {
    type Error = Fields;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fields> {
        Err(Fields(&[]))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Fields> {
        Err(Fields(names))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
