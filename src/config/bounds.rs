//! Bounds of numbers. Each table lists those of its keys in its own file; a document is checked against all of them before it
//! becomes structs, so that a number is refused as written.

use toml::{Table, Value};

use super::error::ConfigError;
use super::parse::Origin;
use super::{
    audit, checkpoint, data, distill, encode, image, latents, lora, model, optimizer, report, s3,
    train, validation,
};

/// Greatest number of steps of a run, and of steps between two events.
pub(super) const MAX_STEPS: i64 = 1_000_000_000;

/// Greatest guidance scale.
pub const MAX_GUIDANCE: f64 = 1000.0;

/// A numeric key with its least and its greatest value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) key: &'static str,
    range: Range,
}

#[derive(Debug, Clone, Copy)]
enum Range {
    Integer(i64, i64),
    Real(f64, f64),
}

/// Bounds of a whole number.
pub(super) const fn integer(key: &'static str, least: i64, most: i64) -> Bounds {
    let range = Range::Integer(least, most);
    Bounds { key, range }
}

/// Bounds of a number with a fraction.
pub(super) const fn real(key: &'static str, least: f64, most: f64) -> Bounds {
    let range = Range::Real(least, most);
    Bounds { key, range }
}

/// The bounds of every numeric key.
pub(super) fn all() -> impl Iterator<Item = &'static Bounds> {
    let tables: [&[Bounds]; 14] = [
        data::NUMBERS,
        s3::NUMBERS,
        image::NUMBERS,
        model::NUMBERS,
        encode::NUMBERS,
        distill::NUMBERS,
        lora::NUMBERS,
        optimizer::NUMBERS,
        train::NUMBERS,
        checkpoint::NUMBERS,
        validation::NUMBERS,
        report::NUMBERS,
        latents::NUMBERS,
        audit::NUMBERS,
    ];
    tables.into_iter().flatten()
}

/// Refuses the first number of a document that is out of bounds. Values of other types are left to their deserialization.
pub(super) fn check(root: &Table, origin: &Origin) -> Result<(), ConfigError> {
    for bounds in all() {
        let mut keys = bounds.key.split('.');
        let first = keys.next().and_then(|key| root.get(key));
        let found = keys.fold(first, |table, key| table?.get(key));
        let refused = found.and_then(|value| Some((value, bounds.refusal(value)?)));
        if let Some((value, needs)) = refused {
            return Err(ConfigError::Invalid {
                entry: origin.entry(bounds.key, value),
                needs,
            });
        }
    }
    Ok(())
}

/// Bound of the key `key`, for a number that a document can't hold.
pub(super) fn beyond(key: &str, negative: bool) -> String {
    match (all().find(|bounds| bounds.key == key), negative) {
        (Some(bounds), false) => format!("must be at most {}", bounds.most()),
        (Some(bounds), true) => format!("must be at least {}", bounds.least()),
        (None, false) => format!("number too large: at most {}", i64::MAX),
        (None, true) => format!("number too small: at least {}", i64::MIN),
    }
}

impl Bounds {
    /// Fault of `value`; `None` for a number in bounds and for another type.
    fn refusal(&self, value: &Value) -> Option<String> {
        let (below, above) = match (self.range, value) {
            (Range::Integer(least, most), Value::Integer(number)) => {
                (*number < least, *number > most)
            }
            (Range::Real(least, most), Value::Integer(number)) => {
                ((*number as f64) < least, *number as f64 > most)
            }
            (Range::Real(_, _), Value::Float(number)) if !number.is_finite() => {
                return Some(format!("must be a finite number, {}", self.words()));
            }
            (Range::Real(least, most), Value::Float(number)) => (*number < least, *number > most),
            _ => return None,
        };
        match (below, above) {
            (true, _) => Some(format!("must be at least {}", self.least())),
            (_, true) => Some(format!("must be at most {}", self.most())),
            _ => None,
        }
    }

    /// The bounds as the documentation has them, as `1 to 512`.
    pub(super) fn words(&self) -> String {
        format!("{} to {}", self.least(), self.most())
    }

    pub(super) fn least(&self) -> String {
        match self.range {
            Range::Integer(least, _) => least.to_string(),
            Range::Real(least, _) => shortest(least),
        }
    }

    pub(super) fn most(&self) -> String {
        match self.range {
            Range::Integer(_, most) => most.to_string(),
            Range::Real(_, most) => shortest(most),
        }
    }
}

/// A number with an exponent only where the digits would be many.
fn shortest(number: f64) -> String {
    if number == 0.0 || (1e-6..1e7).contains(&number.abs()) {
        number.to_string()
    } else {
        format!("{number:e}")
    }
}
