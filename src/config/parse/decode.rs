//! A serde deserializer over a TOML value. Its errors hold the key, the kind of mistake and the allowed values as data,
//! which the errors of the `toml` crate have only as text.

use std::fmt;

use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, Visitor, value::StrDeserializer,
};
use serde::forward_to_deserialize_any;
use toml::Value;

use super::document::{Origin, join};
use crate::config::{ConfigError, required};

/// Deserialises the table `root`.
pub(super) fn decode<'de, T: Deserialize<'de>>(
    root: &'de Value,
    origin: &Origin,
) -> Result<T, ConfigError> {
    let node = Node {
        path: "",
        value: root,
    };
    T::deserialize(node).map_err(|error| error.report(root, origin))
}

/// The type of a value in words.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number with a fraction",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// A mistake in the value at `path`. The innermost node that was being read fills the path in.
#[derive(Debug)]
struct ValueError {
    path: Option<String>,
    kind: ValueErrorKind,
}

#[derive(Debug)]
enum ValueErrorKind {
    Type { needs: String },
    Choice { choices: String },
    Missing { key: &'static str },
    Other(String),
}

impl ValueError {
    fn new(kind: ValueErrorKind) -> Self {
        Self { path: None, kind }
    }

    fn at(mut self, path: &str) -> Self {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }

    fn report(self, root: &Value, origin: &Origin) -> ConfigError {
        let path = self.path.unwrap_or_default();
        let found = lookup(root, &path);
        let entry = origin.entry(&path, found.map(ToString::to_string).unwrap_or_default());
        match self.kind {
            ValueErrorKind::Type { needs } => ConfigError::WrongType {
                entry,
                found: found.map_or("nothing", type_name),
                needs,
            },
            ValueErrorKind::Choice { choices } => ConfigError::UnknownChoice { entry, choices },
            ValueErrorKind::Missing { key } => {
                let key = join(&path, key);
                ConfigError::Missing {
                    place: entry.place,
                    meaning: required::meaning(&key),
                    key,
                }
            }
            ValueErrorKind::Other(needs) => ConfigError::Invalid { entry, needs },
        }
    }
}

/// The value at a full key, as `encode.devices[1]`.
fn lookup<'a>(root: &'a Value, key: &str) -> Option<&'a Value> {
    let mut value = root;
    for part in key.split(['.', '[']).filter(|part| !part.is_empty()) {
        value = match part.strip_suffix(']') {
            Some(index) => value.get(index.parse::<usize>().ok()?)?,
            None => value.get(part)?,
        };
    }
    Some(value)
}

/// serde's name of an expected type, in the words of the documentation.
fn plain(expected: &dyn Expected) -> String {
    let name = expected.to_string();
    match name.as_str() {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "path string" => "a string".to_owned(),
        "a sequence" => "a list".to_owned(),
        other if other.starts_with("struct ") => "a table".to_owned(),
        _ => name,
    }
}

fn quoted(choices: &[&str]) -> String {
    let quoted: Vec<_> = choices.iter().map(|choice| format!("{choice:?}")).collect();
    quoted.join(", ")
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?}", self.kind, self.path)
    }
}

impl std::error::Error for ValueError {}

impl Error for ValueError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(ValueErrorKind::Other(message.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(ValueErrorKind::Type {
            needs: plain(expected),
        })
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(ValueErrorKind::Other(format!("needs {}", plain(expected))))
    }

    fn unknown_variant(_: &str, expected: &'static [&'static str]) -> Self {
        Self::new(ValueErrorKind::Choice {
            choices: quoted(expected),
        })
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(ValueErrorKind::Missing { key: field })
    }
}

/// One value and the key it stands at.
struct Node<'a, 'de> {
    path: &'a str,
    value: &'de Value,
}

impl<'de> Node<'_, 'de> {
    /// Deserialises the node; an error that has no path yet gets the path of this node.
    fn read<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, ValueError> {
        let path = self.path;
        seed.deserialize(self).map_err(|error| error.at(path))
    }
}

impl<'de> Deserializer<'de> for Node<'_, 'de> {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.value {
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(truth) => visitor.visit_bool(*truth),
            Value::Datetime(_) => Err(ValueError::invalid_type(
                Unexpected::Other("date"),
                &visitor,
            )),
            Value::Array(items) => visitor.visit_seq(Items {
                path: self.path,
                items,
                next: 0,
            }),
            Value::Table(table) => visitor.visit_map(Entries {
                path: self.path,
                entries: table.iter(),
                current: None,
            }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        let Value::String(text) = self.value else {
            let needs = format!("one of {}", quoted(variants));
            return Err(ValueError::new(ValueErrorKind::Type { needs }));
        };
        let word: StrDeserializer<'_, ValueError> = text.as_str().into_deserializer();
        visitor.visit_enum(word)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

struct Items<'a, 'de> {
    path: &'a str,
    items: &'de [Value],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'_, 'de> {
    type Error = ValueError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ValueError> {
        let Some(value) = self.items.get(self.next) else {
            return Ok(None);
        };
        let path = format!("{}[{}]", self.path, self.next);
        self.next += 1;
        Node { path: &path, value }.read(seed).map(Some)
    }
}

struct Entries<'a, 'de> {
    path: &'a str,
    entries: toml::map::Iter<'de, String, Value>,
    current: Option<(&'de str, &'de Value)>,
}

impl<'de> MapAccess<'de> for Entries<'_, 'de> {
    type Error = ValueError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ValueError> {
        self.current = self
            .entries
            .next()
            .map(|(key, value)| (key.as_str(), value));
        match self.current {
            Some((key, _)) => {
                let key: StrDeserializer<'_, ValueError> = key.into_deserializer();
                seed.deserialize(key).map(Some)
            }
            None => Ok(None),
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ValueError> {
        let Some((key, value)) = self.current.take() else {
            return Err(ValueError::custom("a value was asked for before its key"));
        };
        let path = join(self.path, key);
        Node { path: &path, value }.read(seed)
    }
}
